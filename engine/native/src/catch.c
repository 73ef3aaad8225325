/* A container's runtime starts, and its first process is caught when it is about to begin. */
#include "birth.h"
#include "cleanup.h"
#include "tracer.h"

#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_link.h>
#include <linux/rtnetlink.h>
#include <linux/seccomp.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define FOLLOW                                                                                                      \
	(PTRACE_O_EXITKILL | PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE \
	 | PTRACE_O_TRACEEXEC)
#define STOP_EVENT(status) ((unsigned) (status) >> 16)

struct hunt {
	struct ph_catch *wanted;
	pid_t command; /* what we have started; 0 when it has ended */
	pid_t caught;
	int status; /* the command's, when it has ended */
	char bridge[IF_NAMESIZE]; /* what the device that is made now is a port of; empty if of nothing */
	pid_t *others;
	size_t count, room;
};

static bool
knows (const struct hunt *hunt, pid_t pid)
{
	for (size_t i = 0; i < hunt->count; i++)
		if (hunt->others[i] == pid)
			return true;
	return false;
}

/* A process that is traced now. If it cannot be noted, it is killed. */
static int
add (struct hunt *hunt, pid_t pid, struct ph_error *err)
{
	if (knows (hunt, pid) || pid == hunt->caught)
		return 0;
	if (hunt->count == hunt->room)
		{
			size_t room = hunt->room ? 2 * hunt->room : 64;
			pid_t *more = realloc (hunt->others, room * sizeof (*more));
			if (!more)
				{
					kill (pid, SIGKILL);
					return ph_fail (err, ENOMEM, "follow another process");
				}
			hunt->others = more;
			hunt->room = room;
		}
	hunt->others[hunt->count++] = pid;
	return 0;
}

static void
forget (struct hunt *hunt, pid_t pid)
{
	for (size_t i = 0; i < hunt->count; i++)
		if (hunt->others[i] == pid)
			hunt->others[i--] = hunt->others[--hunt->count];
}

/* Find a line of a thread's status (proc_pid_status(5)): what stands behind its name, in `line`. NULL: it is gone. */
static char *
status_of (pid_t pid, const char *name, char *line, int size)
{
	char path[64], *found = NULL;

	snprintf (path, sizeof (path), "/proc/%d/status", pid);
	FILE *file = fopen (path, "re");
	while (file && !found && fgets (line, size, file))
		if (strncmp (line, name, strlen (name)) == 0)
			found = line + strlen (name);
	if (file)
		fclose (file);
	return found;
}

/* Whether a process is number 1 in a pid namespace below ours. */
static bool
is_first (pid_t pid)
{
	char line[256], *rest = status_of (pid, "NSpid:", line, sizeof (line)), *next;
	char *here = rest ? strtok (rest, "\t \n") : NULL, *last = here;

	while (here && (next = strtok (NULL, "\t \n")))
		last = next;
	return last != here && strcmp (last, "1") == 0;
}

static pid_t
start (const struct ph_catch *wanted, struct ph_error *err)
{
	int gate[2];

	if (pipe2 (gate, O_CLOEXEC) < 0)
		return ph_fail (err, errno, "make a pipe");
	pid_t pid = fork ();
	if (pid == 0) /* which has nowhere to count: GCOVR_EXCL_START */
		{
			char byte;
			sigset_t none;

			prctl (PR_SET_PDEATHSIG, SIGKILL);
			while (read (gate[0], &byte, 1) < 0 && errno == EINTR)
				;
			dup2 (wanted->input, 0);
			dup2 (wanted->output, 1);
			dup2 (wanted->output, 2);
			syscall (__NR_close_range, 3, ~0u, 0);
			prctl (PR_SET_PDEATHSIG, 0);
			sigemptyset (&none);
			sigprocmask (SIG_SETMASK, &none, NULL);
			execve (wanted->path, wanted->argv, wanted->environment);
			_exit (127);
		} /* GCOVR_EXCL_STOP */
	close (gate[0]);
	if (pid < 0)
		ph_fail (err, errno, "start %s", wanted->path);
	else if (ptrace (PTRACE_SEIZE, pid, 0, FOLLOW) < 0)
		{
			ph_fail (err, errno, "trace %s", wanted->path);
			kill (pid, SIGKILL);
			waitpid (pid, NULL, 0);
			pid = -1;
		}
	else if (write (gate[1], "", 1) != 1)
		ph_fail (err, errno, "start %s", wanted->path);
	close (gate[1]);
	return pid;
}

/* The caught one stops again before it has run a single instruction: from there calls can be made in it. */
static int
settle (struct hunt *hunt, pid_t pid, struct ph_error *err)
{
	hunt->caught = pid;
	forget (hunt, pid);
	if (ptrace (PTRACE_SETOPTIONS, pid, 0, SKELETON_OPTIONS) < 0
	    && ptrace (PTRACE_SETOPTIONS, pid, 0, SKELETON_OPTIONS & ~PTRACE_O_SUSPEND_SECCOMP) < 0)
		return ph_fail (err, errno, "trace process %d", pid);
	if (ptrace (PTRACE_INTERRUPT, pid, 0, 0) < 0 || ptrace (PTRACE_CONT, pid, 0, 0) < 0)
		return ph_fail (err, errno, "interrupt process %d", pid);
	if (trace_wait_stop (pid, ph_now_us () + 5000000, NULL, err) < 0)
		return -1;
	for (size_t i = 0; i < hunt->count; i++) /* one that has ended meanwhile is told of below */
		ptrace (PTRACE_INTERRUPT, hunt->others[i], 0, 0);
	return 0;
}

static void
note (struct ph_catch *wanted, const char *bridge, int port)
{
	struct ph_plug *plug = &wanted->plugs[wanted->plug_count++];

	memcpy (plug->bridge, bridge, IF_NAMESIZE);
	plug->port = port;
}

/* A device is to become a port of a bridge: note it, and have no call made. */
static void
unplug (struct hunt *hunt, pid_t pid, uint64_t argument)
{
	struct ifreq request = { 0 };
	struct iovec here = { &request, sizeof (request) }, there = { (void *) argument, sizeof (request) };

	if (process_vm_readv (pid, &here, 1, &there, 1, 0) != sizeof (request) || hunt->wanted->plug_count == PH_PLUGS)
		return;
	request.ifr_name[IF_NAMESIZE - 1] = 0;
	note (hunt->wanted, request.ifr_name, request.ifr_ifindex);
}

/* A request to rtnetlink about one device, as it stands in a task's memory at `where`. */
struct request {
	union {
		struct nlmsghdr head;
		uint8_t bytes[4096];
	};
	uint64_t where;
};

/* Whether a socket is of our own network namespace: indexes and names of devices mean the same there. Threads are in
   another one than their sockets. */
static bool
is_of_home (pid_t pid, int number)
{
	struct stat ours, theirs;
	char line[256], *leader = status_of (pid, "Tgid:", line, sizeof (line));
	cleanup_close int process = leader ? (int) syscall (__NR_pidfd_open, atoi (leader), 0) : -1;
	cleanup_close int own = process < 0 ? -1 : (int) syscall (__NR_pidfd_getfd, process, number, 0);
	cleanup_close int space = own < 0 ? -1 : ioctl (own, SIOCGSKNS);

	return space >= 0 && stat ("/proc/self/ns/net", &ours) == 0 && fstat (space, &theirs) == 0
	       && ours.st_ino == theirs.st_ino && ours.st_dev == theirs.st_dev;
}

/* Whether sendto(2) sends to the kernel, or to whoever the socket is connected with. */
static bool
sends_to_kernel (pid_t pid, const uint64_t *args)
{
	sa_family_t family = AF_NETLINK;
	struct iovec here = { &family, sizeof (family) }, there = { (void *) args[4], sizeof (family) };

	return (!args[4] || process_vm_readv (pid, &here, 1, &there, 1, 0) == sizeof (family)) && family == AF_NETLINK;
}

/* Read what is about to be sent, if it is a request of rtnetlink to make or change a device here. */
static bool
read_request (pid_t pid, const uint64_t *args, struct request *request)
{
	struct iovec here = { request->bytes, sizeof (request->bytes) }, there = { (void *) args[1], args[2] };

	if (args[2] < NLMSG_LENGTH (sizeof (struct ifinfomsg)) || args[2] > sizeof (request->bytes))
		return false;
	if (!sends_to_kernel (pid, args))
		return false;
	if (process_vm_readv (pid, &here, 1, &there, 1, 0) != (ssize_t) args[2])
		return false;
	request->where = args[1];
	const struct nlmsghdr *head = &request->head;
	if (head->nlmsg_len > args[2] || head->nlmsg_len < NLMSG_LENGTH (sizeof (struct ifinfomsg)))
		return false;
	return (head->nlmsg_type == RTM_NEWLINK || head->nlmsg_type == RTM_SETLINK)
	       && is_of_home (pid, (int) args[0]);
}

static struct rtattr *
find_attribute (struct request *request, unsigned short type)
{
	struct rtattr *one = IFLA_RTA (NLMSG_DATA (&request->head));
	int size = (int) IFLA_PAYLOAD (&request->head);

	for (; RTA_OK (one, size); one = RTA_NEXT (one, size))
		if ((one->rta_type & NLA_TYPE_MASK) == type)
			return one;
	return NULL;
}

/* Change it where it is. */
static bool
change_request (pid_t pid, const struct request *request, void *at, size_t size)
{
	uint64_t where = request->where + (uint64_t) ((uint8_t *) at - request->bytes);
	struct iovec here = { at, size }, there = { (void *) where, size };

	return process_vm_writev (pid, &here, 1, &there, 1, 0) == (ssize_t) size;
}

/* A device is to be a port of a bridge: note it, and have it be a port of none. One that is made as a port may be one,
   but stays down (`leave_down`): nothing is heard at it, and the bridge is in use. */
static void
leave_out_master (struct hunt *hunt, pid_t pid, struct request *request)
{
	struct ifinfomsg *info = NLMSG_DATA (&request->head);
	struct rtattr *attribute = find_attribute (request, IFLA_MASTER);
	char name[IF_NAMESIZE];
	uint32_t master, none = 0;

	if (!attribute || RTA_PAYLOAD (attribute) != sizeof (master))
		return;
	memcpy (&master, RTA_DATA (attribute), sizeof (master));
	if (master == 0 || !if_indextoname (master, name))
		return;
	if (info->ifi_index == 0)
		{
			memcpy (hunt->bridge, name, sizeof (hunt->bridge));
			return;
		}
	memcpy (RTA_DATA (attribute), &none, sizeof (none));
	if (change_request (pid, request, RTA_DATA (attribute), sizeof (none)))
		note (hunt->wanted, name, info->ifi_index);
}

/* A device goes up that was made as a port of a bridge: note it, and have it stay down. */
static void
leave_down (struct hunt *hunt, pid_t pid, struct request *request)
{
	struct ifinfomsg *info = NLMSG_DATA (&request->head);

	if (!hunt->bridge[0] || !(info->ifi_flags & info->ifi_change & IFF_UP))
		return;
	info->ifi_flags &= ~(unsigned) IFF_UP;
	if (!change_request (pid, request, info, sizeof (*info)))
		return;
	note (hunt->wanted, hunt->bridge, info->ifi_index);
	hunt->bridge[0] = 0;
}

/* Something is to be set of a port that is none: note it. The kernel is asked to change nothing of the device. */
static void
leave_out_settings (struct hunt *hunt, pid_t pid, struct request *request)
{
	struct ph_catch *wanted = hunt->wanted;
	struct ifinfomsg *info = NLMSG_DATA (&request->head);
	struct rtattr *attribute = find_attribute (request, IFLA_PROTINFO);
	struct ph_plug *plug = NULL;

	for (uint32_t i = 0; i < wanted->plug_count; i++)
		if (wanted->plugs[i].port == info->ifi_index)
			plug = &wanted->plugs[i];
	if (!attribute || !plug || RTA_PAYLOAD (attribute) > sizeof (plug->set) - plug->set_size)
		return;
	info->ifi_family = AF_UNSPEC;
	if (!change_request (pid, request, &info->ifi_family, sizeof (info->ifi_family)))
		return;
	memcpy (plug->set + plug->set_size, RTA_DATA (attribute), RTA_PAYLOAD (attribute));
	plug->set_size += (uint32_t) RTA_ALIGN (RTA_PAYLOAD (attribute));
}

/* Something is sent through a socket, which may be one of rtnetlink. */
static void
look_at_message (struct hunt *hunt, pid_t pid, const uint64_t *args)
{
	struct request request;

	if (!read_request (pid, args, &request))
		return;
	struct ifinfomsg *info = NLMSG_DATA (&request.head);
	if (info->ifi_family == AF_BRIDGE)
		leave_out_settings (hunt, pid, &request);
	else if (hunt->wanted->plug_count < PH_PLUGS)
		{
			leave_down (hunt, pid, &request);
			leave_out_master (hunt, pid, &request);
		}
}

/* Whether a call takes privileges from its thread, or confines it. */
static bool
gives_up (const struct __ptrace_syscall_info *info)
{
	const uint64_t *args = (const uint64_t *) info->entry.args;

	switch (info->entry.nr)
		{
		case __NR_capset:
		case __NR_setuid:
		case __NR_setgid:
		case __NR_setreuid:
		case __NR_setregid:
		case __NR_setresuid:
		case __NR_setresgid:
		case __NR_setgroups:
			return true;
		case __NR_prctl:
			return args[0] == PR_CAPBSET_DROP || args[0] == PR_SET_SECCOMP || args[0] == PR_SET_SECUREBITS;
		case __NR_seccomp: /* without a filter it asks what the kernel knows */
			return args[0] == SECCOMP_SET_MODE_FILTER && args[2] != 0;
		default:
			return false;
		}
}

/* The entry of a system call, or its exit. A call that is not made has number -1 in between, and succeeds. */
static void
look_at_call (struct hunt *hunt, pid_t pid)
{
	struct __ptrace_syscall_info info = { 0 };
	struct user_regs_struct regs;
	struct ph_error ignored;

	if (ptrace (PTRACE_GET_SYSCALL_INFO, pid, sizeof (info), &info) <= 0)
		return;
	bool entry = info.op == PTRACE_SYSCALL_INFO_ENTRY;
	if (entry && info.entry.nr == __NR_sendto)
		{
			look_at_message (hunt, pid, (const uint64_t *) info.entry.args);
			return;
		}
	bool plugs = entry && info.entry.nr == __NR_ioctl && info.entry.args[1] == SIOCBRADDIF;
	bool keeps = entry && hunt->wanted->privileged && gives_up (&info) && is_first (pid);
	if (!plugs && !keeps && info.op != PTRACE_SYSCALL_INFO_EXIT)
		return;
	if (info.op == PTRACE_SYSCALL_INFO_EXIT && info.exit.rval != -ENOSYS)
		return;
	if (trace_get_regs (pid, &regs, &ignored) < 0)
		return;
	if (plugs)
		unplug (hunt, pid, info.entry.args[2]);
	if (plugs || keeps)
		regs.orig_rax = ~0ul;
	else if (regs.orig_rax == ~0ul)
		regs.rax = 0;
	trace_set_regs (pid, &regs, &ignored);
}

/* What one of them was stopped for. When the first process is caught, all others are let go. */
static int
take (struct hunt *hunt, pid_t pid, int status, struct ph_error *err)
{
	unsigned event = STOP_EVENT (status);
	int signal = event ? 0 : WSTOPSIG (status);
	unsigned long born;

	if (add (hunt, pid, err) < 0)
		return -1;
	if ((event == PTRACE_EVENT_FORK || event == PTRACE_EVENT_VFORK || event == PTRACE_EVENT_CLONE)
	    && ptrace (PTRACE_GETEVENTMSG, pid, 0, &born) == 0 && add (hunt, (pid_t) born, err) < 0)
		return -1;
	if (event == PTRACE_EVENT_EXEC && !hunt->caught && is_first (pid))
		return settle (hunt, pid, err);
	if (event == 0 && signal == (SIGTRAP | 0x80))
		{
			look_at_call (hunt, pid);
			signal = 0;
		}
	if (hunt->caught)
		{
			if (ptrace (PTRACE_DETACH, pid, 0, signal) == 0 || errno == ESRCH)
				forget (hunt, pid);
		}
	else if (event == PTRACE_EVENT_STOP && WSTOPSIG (status) != SIGTRAP)
		ptrace (PTRACE_LISTEN, pid, 0, 0);
	else
		ptrace (PTRACE_SYSCALL, pid, 0, signal);
	return 0;
}

static bool
over (const struct hunt *hunt)
{
	return hunt->caught ? hunt->count == 0 && !hunt->command : hunt->count == 0;
}

static int
follow (struct hunt *hunt, struct ph_error *err)
{
	int64_t deadline = ph_now_us () + (int64_t) hunt->wanted->timeout_ms * 1000;

	while (!over (hunt))
		{
			int status;
			pid_t pid = waitpid (-1, &status, __WALL | __WNOTHREAD | WNOHANG);

			if (pid == 0 || (pid < 0 && errno == EINTR))
				{
					if (ph_now_us () > deadline)
						return ph_fail (err, ETIMEDOUT, "wait for %s", hunt->wanted->path);
					usleep (100);
					continue;
				}
			if (pid < 0)
				break;
			if (pid == hunt->caught)
				return ph_fail (err, ECHILD, "the first process of the container ended with status %#x", status);
			if (WIFSTOPPED (status))
				{
					if (take (hunt, pid, status, err) < 0)
						return -1;
					continue;
				}
			forget (hunt, pid);
			if (pid == hunt->command)
				{
					hunt->command = 0;
					hunt->status = status;
				}
		}
	if (hunt->caught && hunt->status == 0)
		return 0;
	return ph_fail (err, ECHILD, "%s ended with status %#x", hunt->wanted->path, hunt->status);
}

/* Wait until all are gone, with those whose birth has not been told yet: they show by a stop. */
static void
bury (void)
{
	for (;;)
		{
			int status;
			pid_t pid = waitpid (-1, &status, __WALL | __WNOTHREAD);

			if (pid < 0 && errno != EINTR)
				return;
			if (pid > 0 && WIFSTOPPED (status))
				kill (pid, SIGKILL);
		}
}

static long
catch (void *argument, struct ph_error *err)
{
	struct hunt hunt = { .wanted = argument };
	pid_t pid = start (hunt.wanted, err);
	int result = -1;

	if (pid < 0)
		return -1;
	hunt.command = pid;
	if (add (&hunt, pid, err) == 0)
		result = follow (&hunt, err);
	if (result < 0)
		{
			if (hunt.caught)
				kill (hunt.caught, SIGKILL);
			if (hunt.command)
				kill (hunt.command, SIGKILL);
			for (size_t i = 0; i < hunt.count; i++)
				kill (hunt.others[i], SIGKILL);
			bury ();
		}
	free (hunt.others);
	return result < 0 ? -1 : hunt.caught;
}

long
ph_catch (struct ph_tracer *tracer, struct ph_catch *wanted, struct ph_error *err)
{
	return ph_tracer_call (tracer, catch, wanted, err);
}
