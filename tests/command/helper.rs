//! mount(8): by the helper mount.diskfuse, and through mount.fuse3.

use std::fs;
use std::process::Command;

use libtest_mimic::Trial;

use crate::common::ability::Ability;
use crate::common::export::{Export, binary};
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;
use crate::common::{mounts, program, succeed};

const MOUNT: [Ability; 4] = ["root", "fuse", "mount.fuse3", "findmnt"];

pub fn trials() -> Vec<Trial> {
    let with = |name: &str, needs: &[Ability], script| {
        trial(format!("mount/{name}"), [&MOUNT, needs].concat(), move || run(script))
    };
    let trial = |name: &str, script| with(name, &[], script);
    vec![
        trial("helper_mounts_and_returns", HELPER),
        trial("fstab_is_mounted_once", FSTAB),
        trial("helper_looks_without_mounting", FAKE),
        trial("helper_fails_as_mount_expects", FAILURES),
        trial("helper_mounts_in_another_namespace", NAMESPACE),
        with("remote_disks_have_all_options_in_fstab", &["nbd", "nbdkit"], REMOTE),
        with("servers_are_one_word", &["qemu-nbd", "nbdkit"], SERVERS),
        self::trial(
            "mount/nobody_else_is_sent_to_the_background".into(),
            vec!["root", "fuse"],
            nobody_else_is_sent_to_the_background,
        ),
    ]
}

/// What mount(8) finds: it clears PATH, and looks for its helpers in /sbin only.
const BEFORE: &str = r#"
    mount -t tmpfs none /usr/local/bin
    ln -s "$1" /usr/local/bin/diskfuse
    mkdir /usr/local/bin/sbin
    mount --bind /usr/sbin /usr/local/bin/sbin
    mount -t tmpfs none /usr/sbin
    ln -s /usr/local/bin/sbin/* /usr/sbin/
    ln -s "$1" /usr/sbin/mount.diskfuse
    [[ /sbin -ef /usr/sbin ]]
    cd "$2"
    head -c 8192 /dev/urandom > image
    ended() {
        local pidfile=${1:-pid}
        for _ in {1..2000}; do [[ -e $pidfile ]] || break; sleep 0.01; done
        [[ ! -e $pidfile ]]
    }
    fails() {
        local expected=$1 status=0
        shift
        "$@" 2> said || status=$?
        [[ $status == "$expected" ]] || { echo "status $status: $(cat said)"; exit 1; }
    }
"#;

const HELPER: &str = r#"
    options=_netdev,nofail,x-systemd.requires=a.service,pidfile=$PWD/pid
    mount -t diskfuse "$PWD/image" "$PWD/disk" -o "ro,$options"
    cmp image disk
    findmnt -n -o FSTYPE,SOURCE --mountpoint "$PWD/disk" | grep "fuse.diskfuse $PWD/image"
    fails 1 eval 'printf x 1<> disk'
    umount disk
    ended
    mount -v -n -t diskfuse "$PWD/image" "$PWD/disk" -o "$options"
    for _ in 1 2; do
        mount -o remount,ro "$PWD/disk"
        fails 1 eval 'printf x 1<> disk'
        mount -t diskfuse -o remount,rw "$PWD/image" "$PWD/disk"
        printf x 1<> disk
    done
    umount disk
    ended
    [[ $(head -c 1 image) == x && ! -e disk ]]
"#;

const FSTAB: &str = r#"
    touch one two three
    cat > fstab <<END
$PWD/image $PWD/one diskfuse ro,nofail,x-systemd.automount,pidfile=$PWD/pid-one 0 0
mem:1M $PWD/two fuse.diskfuse pidfile=$PWD/pid-two 0 0
mem:1M $PWD/three fuse.diskfuse users,pidfile=$PWD/pid-three 0 0
END
    for _ in 1 2 3; do mount -T fstab -a; done
    for disk in one two three; do
        [[ $(findmnt -n --mountpoint "$PWD/$disk" | wc -l) == 1 ]]
        [[ -n $(cat pid-$disk) ]]
        cat "$disk" > /dev/null
        umount "$disk"
        ended "pid-$disk"
    done
"#;

const FAKE: &str = r#"
    mount -f -t diskfuse "$PWD/image" "$PWD/disk" -o ro
    [[ ! -e disk ]]
    fails 1 mount -f -t diskfuse "$PWD/image" "$PWD/disk" -o nonsense
    grep -q 'nonsense: no such option' said
    mount -f -s -t diskfuse "$PWD/image" "$PWD/disk" -o nonsense
    [[ ! -e disk ]]
    mount -s -t diskfuse "$PWD/image" "$PWD/disk" -o "nonsense,pidfile=$PWD/pid"
    cmp image disk
    umount disk
    ended
"#;

const FAILURES: &str = r#"
    fails 32 mount -t diskfuse "$PWD/missing" "$PWD/disk"
    grep -q 'missing: no such file' said
    mkdir folder
    fails 32 mount -t diskfuse "$PWD/image" "$PWD/folder"
    grep -q "rmdir $PWD/folder && touch $PWD/folder" said
    fails 1 mount.diskfuse "$PWD/image"
    fails 1 mount.diskfuse "$PWD/image" "$PWD/disk" -z
    # The program's own, through mount.fuse3.
    fails 3 mount -t fuse.diskfuse "$PWD/missing" "$PWD/disk"
    [[ $(mount.diskfuse --version) == "$("$1" -V)" && $("$1" -V) == "diskfuse "[0-9]* ]]
    [[ ! -e disk ]]
"#;

const NAMESPACE: &str = r#"
    touch disk
    unshare --mount sleep 100 &
    other=$!
    until [[ ! /proc/$other/ns/mnt -ef /proc/self/ns/mnt ]]; do sleep 0.01; done
    mount -N $other -t diskfuse "$PWD/image" "$PWD/disk" -o "pidfile=$PWD/pid"
    nsenter --mount=/proc/$other/ns/mnt cmp "$PWD/image" "$PWD/disk"
    [[ ! -s disk ]]
    nsenter --mount=/proc/$other/ns/mnt umount "$PWD/disk"
    ended
    kill $other
"#;

/// Through both helpers, and by a part of the disk that starts where mount(8) would make a loop
/// device of an `offset`.
const REMOTE: &str = r#"
    touch one two
    nbdkit --unix "$PWD/socket" file image
    options=connect-timeout=20,open-timeout=20,timeout=30,reconnect-timeout=40,unflushed=8M
    options+=,connections=2,cache=writethrough,kernel-cache,read-ahead=1M,truncate=zero
    options+=,queue-depth=8,io-uring=off,allow-other=off,uid=0,gid=0,ro,_netdev,nofail
    cat > fstab <<END
nbd+unix:///?socket=$PWD/socket $PWD/one diskfuse $options,start=4096,pidfile=$PWD/pid-one 0 0
nbd+unix:///?socket=$PWD/socket $PWD/two fuse.diskfuse $options,size=4096,pidfile=$PWD/pid-two 0 0
END
    for _ in 1 2; do mount -T fstab -a; done
    cmp <(tail -c 4096 image) one
    cmp <(head -c 4096 image) two
    for disk in one two; do
        [[ $(findmnt -n --mountpoint "$PWD/$disk" | wc -l) == 1 ]]
        umount "$disk"
        ended "pid-$disk"
    done
"#;

/// `[ COMMAND ]` as mount(8) and fstab(5) can have it.
const SERVERS: &str = r#"
    touch one two three
    mv image 'an image'
    source="[ qemu-nbd -f raw '$PWD/an image' ]"
    mount -t diskfuse "$source" "$PWD/one" -o "pidfile=$PWD/pid-one"
    [[ $(findmnt -n -o SOURCE --mountpoint "$PWD/one") == "$source" ]]
    cmp 'an image' one
    mount -o remount,ro "$PWD/one"
    fails 1 eval 'printf x 1<> one'
    cat > fstab <<END
[\040nbdkit\040-r\040file\040file="$PWD/an\040image"\040] $PWD/two diskfuse pidfile=$PWD/pid-two 0 0
[\040nbdkit\040-r\040data\040'data=1\0402'\040] $PWD/three fuse.diskfuse pidfile=$PWD/pid-three 0 0
END
    for _ in 1 2; do mount -T fstab -a; done
    cmp 'an image' two
    [[ $(od -An -tu1 -N 2 three) == *1*2* ]]
    for disk in one two three; do
        [[ $(findmnt -n --mountpoint "$PWD/$disk" | wc -l) == 1 ]]
        umount "$disk"
        ended "pid-$disk"
    done
    fails 32 mount -t diskfuse '[ nbdkit file missing ]' "$PWD/one"
    grep -q 'the server has ended before it served' said
    fails 1 mount -t diskfuse "[ nbdkit 'file ]" "$PWD/one"
    grep -q 'a quote' said
"#;

/// In a mount namespace and a PID namespace of its own, whose first process takes all others with
/// it.
fn run(script: &str) {
    let sandbox = Sandbox::new();
    let unshare = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];
    let mut command = program("unshare", unshare);
    command.args(["bash", "-euc", &format!("{BEFORE}{script}"), "bash", binary()]);
    succeed(command.arg(sandbox.path()));
}

/// Whatever options they are in the habit of giving.
fn nobody_else_is_sent_to_the_background() {
    let sandbox = Sandbox::new();
    let habit = |command: &mut Command| {
        command.args(["-o", "rw,nosuid,nodev"]);
    };
    let mut export = Export::try_start("mem:1M", &sandbox.join("disk"), &[], habit)
        .unwrap_or_else(|ended| panic!("{}", ended.log));
    assert_eq!(fs::read(export.file()).unwrap().len(), 1 << 20);
    assert!(!export.has_exited(), "it has left the foreground");
    mounts::unmount(&["umount"], export.file());
    export.wait().assert(0, &[]);
}
