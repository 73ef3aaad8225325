#!/bin/busybox sh
# Process 1 of the first file system: the modules that the disk needs, in order, then on to the disk.
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do /bin/busybox insmod "$module"; done
tries=0
while ! /bin/busybox mount -t ext4 /dev/vda /root 2>/dev/null; do
	tries=$((tries + 1))
	[ $tries -lt 200 ] || exec /bin/busybox sh
	/bin/busybox usleep 50000
done
/bin/busybox umount /dev
exec /bin/busybox switch_root /root /bin/busybox init
