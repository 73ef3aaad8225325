#!/bin/sh
# What process 1 of a test machine (busybox init) runs first: file systems, modules, addresses. Its number comes from
# the kernel's command line (phaul.number=N), and everything that must differ between two machines from that.
set -u
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts -o gid=5,mode=620 devpts /dev/pts
for place in /dev/shm /run /tmp; do mount -t tmpfs -o mode=1777 tmpfs $place; done
mkdir -p /run/sshd /srv/own
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
modprobe -a virtio_net virtio_rng tun tls inet_diag tcp_diag udp_diag unix_diag af_packet_diag sch_ingress cls_bpf

number=$(sed -n 's/.*phaul\.number=\([0-9]*\).*/\1/p' /proc/cmdline)
hostname "vm-$number"
ip link set lo up
# eth0 goes to the other machine, eth1 to whom runs them (qemu's user network).
ip address add "10.78.0.$number/24" dev eth0
ip address add "fd78::$number/64" dev eth0 nodad
ip link set eth0 up
ip address add 10.0.2.15/24 dev eth1
ip link set eth1 up
mount -o ro /dev/vdb /opt/phaul
# Machines that boot alike have the same PIDs: those of each begin elsewhere.
echo $((number * 6000)) >/proc/sys/kernel/ns_last_pid
