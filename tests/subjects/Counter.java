import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.util.HashMap;
import java.util.Map;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;

/**
 * java Counter.java STATUS: counts, in a pool of threads, over a heap that is filled and collected. STATUS holds
 * "COUNT ok", or what went wrong.
 */
public final class Counter {
    private static final int KEYS = 5000;

    public static void main(String[] arguments) throws Exception {
        Path status = Path.of(arguments[0]);
        Path fresh = Path.of(arguments[0] + ".new");
        Map<Long, byte[]> kept = new HashMap<>();
        ExecutorService pool = Executors.newFixedThreadPool(2);
        long count = 0;
        String verdict = "ok";
        while (verdict.equals("ok")) {
            long number = ++count;
            long square = pool.submit(() -> number * number).get();
            kept.put(number % KEYS, Long.toString(number).repeat(100).getBytes());
            long before = Math.max(1, number - KEYS / 2);
            String old = new String(kept.get(before % KEYS));
            if (square != number * number || !old.equals(Long.toString(before).repeat(100))) {
                verdict = "wrong: the square is " + square + ", number " + before + " is kept as " + old;
            }
            Files.writeString(fresh, count + " " + verdict);
            Files.move(fresh, status, StandardCopyOption.ATOMIC_MOVE);
            Thread.sleep(2);
        }
        pool.shutdown();
    }
}
