#!/bin/busybox sh
# First process of a virtual machine: mounts the host's files below a layer of memory, starts the agent that waits for
# jobs on the control port, and powers off when the agent ends.
B=/bin/busybox
R=/machine/root
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev
value() { for word in $($B cat /proc/cmdline); do case $word in "$1"=*) echo "${word#*=}" ;; esac; done; }
end() { echo "init: $*"; $B sync; $B poweroff -f; }

for module in $($B cat /modules/order); do $B insmod "/modules/$module" || end "cannot load $module"; done

$B mkdir -p /machine/host /machine/memory $R
P=trans=virtio,version=9p2000.L,msize=524288
$B mount -t 9p -o $P,ro,cache=loose host /machine/host || end "cannot mount the host's files"
$B mount -t tmpfs -o size=75% tmpfs /machine/memory
$B mkdir /machine/memory/upper /machine/memory/work
$B mount -t overlay -o lowerdir=/machine/host,upperdir=/machine/memory/upper,workdir=/machine/memory/work overlay $R ||
  end "cannot mount the overlay"
$B mount -t proc proc $R/proc
$B mount -t sysfs sys $R/sys
$B mount -t devtmpfs dev $R/dev
$B mkdir -p $R/dev/pts $R/dev/shm
$B mount -t devpts devpts $R/dev/pts
$B mount -t tmpfs -o mode=1777 shm $R/dev/shm
$B mount -t tmpfs run $R/run
FOLDER=$(value lamina.folder)
$B mkdir -p "$R$FOLDER" $R/lib/modules
$B mount -t 9p -o $P "folder" "$R$FOLDER" || end "cannot mount $FOLDER"
$B ln -s "$(value lamina.modules)" "$R/lib/modules/$($B uname -r)"
$B hostname "$(value lamina.name)"
$B ip link set lo up

for port in /sys/class/virtio-ports/*; do
  [ "$($B cat "$port/name")" = control ] && CONTROL=/dev/${port##*/}
done
[ -c "$CONTROL" ] || end "no control port"
ulimit -l unlimited
echo "init: ready"
$B env -i $B chroot $R "$(value lamina.python)" -I -S -B "$(value lamina.agent)" /dev/shm 0<>"$CONTROL"
end "the agent ended with status $?"
