//! What a broken disk looks like from outside.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use libc::{EIO, ENOSPC, EPERM};

use crate::common::export::Export;
use crate::common::image::{LoopDevice, write_sparse};
use crate::common::nbd::{Address, Server};
use crate::common::sandbox::Tight;
use crate::common::suite::{Case, SIZE};
use crate::common::{Aligned, Random, assert_errno, fail, noise, program, succeed};

fn export(case: &Case, source: &Path, options: &[&str]) -> Export {
    let mountpoint = case.sandbox.join("disk");
    Export::try_start(source.to_str().expect("UTF-8"), &mountpoint, &case.options(options), |_| ())
        .unwrap_or_else(|ended| panic!("{}", ended.log))
        .only_by(case.transport)
}

/// Behind the end of its backing file a loop device gives errors.
pub fn error_fails_only_the_requests_that_touch_it(case: &Case) {
    let bytes = noise(6, SIZE);
    let image = case.image(&bytes);
    let store = File::options().write(true).open(image.store.as_ref().unwrap()).unwrap();
    let mut export = case.export(&image, &[]);
    let file = File::open(export.file()).unwrap();
    let (half, bad) = (SIZE / 2, SIZE / 2..SIZE - (64 << 10));
    store.set_len(half as u64).unwrap();
    succeed(program("blockdev", ["--flushbufs"]).arg(image.path()));
    std::thread::scope(|scope| {
        for reader in 0..8 {
            let (file, bad, bytes) = (&file, &bad, &bytes);
            scope.spawn(move || {
                let mut random = Random(reader);
                for _ in 0..50 {
                    let at = random.below(bad.end as u64 - 4096) as usize;
                    let mut buf = [0; 4096];
                    let read = file.read_at(&mut buf, at as u64);
                    // A block device's blocks fail as a whole.
                    match at {
                        _ if at >= bad.start => assert_errno(read, EIO),
                        _ if at + buf.len() <= half - 4096 => {
                            assert_eq!(read.unwrap(), buf.len());
                            assert!(buf[..] == bytes[at..][..buf.len()], "at {at}");
                        }
                        _ => {}
                    }
                }
            });
        }
    });
    store.set_len(SIZE as u64).unwrap();
    let mut buf = [1; 4096];
    assert_eq!(file.read_at(&mut buf, bad.start as u64).unwrap(), buf.len());
    assert!(buf == [0; 4096], "it is served on after the error");
    drop(file);
    export.stop(libc::SIGTERM).assert(0, &[]);
}

/// For who wants what can still be read of a disk that fails.
pub fn device_with_a_bad_end_is_served_read_only(case: &Case) {
    let bytes = noise(6, SIZE);
    let image = case.image(&bytes);
    let (device, half) = (image.path(), SIZE / 2);
    let store = File::options().write(true).open(image.store.as_ref().unwrap()).unwrap();
    store.set_len(half as u64).unwrap();
    succeed(program("blockdev", ["--flushbufs"]).arg(device));
    let refused = case.try_export(&image, &[]).err().expect("it is served writable");
    refused.assert(3, &[&image.source, "cannot be read", "-r"]);
    let mut export = export(case, device, &["-r"]);
    let file = File::open(export.file()).unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE as u64);
    let mut good = vec![0; half];
    file.read_exact_at(&mut good, 0).unwrap();
    assert!(good == bytes[..half]);
    assert_errno(file.read_at(&mut [0; 4096], SIZE as u64 - 4096), EIO);
    drop(file);
    let ended = export.stop(libc::SIGTERM);
    ended.assert(0, &[]);
    let warned = |line: &&str| line.contains(&image.source) && line.contains("cannot be read");
    assert!(ended.warnings().iter().any(warned), "{}", ended.log);
}

/// Writes to the loop device stay in the page cache; only the flush meets the full file system
/// behind it.
pub fn flush_reaches_the_disk_and_its_failure_the_exit_status(case: &Case) {
    let tight = Tight::new(512 << 10);
    let store = tight.join("disk.img");
    write_sparse(&store, &vec![0; SIZE]);
    let device = LoopDevice::new(&store, &[]);

    let mut by_fsync = export(case, Path::new(&device.0), &[]);
    let open = || File::options().write(true).open(by_fsync.file()).unwrap();
    let (file, other) = (open(), open());
    file.write_all_at(&noise(7, 1 << 20), 0).unwrap();
    // A close at which nobody looks, as that of a forked child, hides it from no file that is open.
    drop(file.try_clone().unwrap());
    for file in [file, other] {
        let errno = file.sync_all().unwrap_err().raw_os_error();
        assert!([Some(EIO), Some(ENOSPC)].contains(&errno), "{errno:?}");
    }
    by_fsync.stop(libc::SIGTERM).assert(1, &[&device.0, "flush"]);

    // Written back, and lost, before anyone flushed; then a durable write is the first to be told.
    let mut by_durable_write = export(case, Path::new(&device.0), &[]);
    let open = |flags| {
        let path = by_durable_write.file();
        File::options().write(true).custom_flags(flags).open(path).unwrap()
    };
    let (file, durable) = (open(0), open(libc::O_DSYNC));
    // A child that another trial forks may close what it inherited, and that flush be told first.
    // Not every time.
    let met = (0..20).any(|_| {
        let disk = File::open(&device.0).unwrap();
        file.write_all_at(&noise(8, 1 << 20), 2 << 20).unwrap();
        disk.sync_all().unwrap_err();
        let met = durable.write_at(&[1; 4096], 0).is_err();
        file.sync_all().unwrap_err();
        met
    });
    assert!(met, "no durable write failed");
    drop((file, durable));
    by_durable_write.stop(libc::SIGTERM).assert(1, &[&device.0, "flush"]);

    let mut by_close = export(case, Path::new(&device.0), &[]);
    let dd = ["if=/dev/urandom", "bs=64k", "seek=16", "count=16", "conv=notrunc"];
    let said = fail(program("dd", dd).arg(format!("of={}", by_close.file().display())));
    assert!(said.contains("closing output file"), "{said}");
    by_close.stop(libc::SIGTERM).assert(1, &[&device.0, "flush"]);
}

/// An unaligned write under `--direct` is written out at once, and is told of any loss, which may
/// be another's.
pub fn write_that_is_lost_beside_others_is_told_by_fsync(case: &Case) {
    let tight = Tight::new(512 << 10);
    let store = tight.join("disk.img");
    write_sparse(&store, &vec![0; SIZE]);
    let device = LoopDevice::new(&store, &[]);
    let mut export = export(case, Path::new(&device.0), &[]);
    let file = File::options().write(true).open(export.file()).unwrap();
    // More than there is room for: some of them fail, and more may be lost.
    let failed = (0..256).any(|n| file.write_all_at(&[1; 100], n * 4096 + 1).is_err());
    assert!(failed, "there was room for all");
    file.sync_all().unwrap_err();
    drop(file);
    export.stop(libc::SIGTERM).assert(1, &[&device.0, "flush"]);
}

pub fn full_file_system_says_so(case: &Case) {
    let tight = Tight::new(2 << 20);
    let path = tight.join("disk.img");
    let mut bytes = noise(8, SIZE);
    bytes[1 << 20..].fill(0);
    write_sparse(&path, &bytes);
    let mut export = export(case, &path, &[]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    let data = Aligned::of(&noise(9, 64 << 10));
    let results: Vec<_> = (16..64).map(|i| file.write_at(&data, i * data.len() as u64)).collect();
    assert!(results[0].is_ok(), "{:?}", results[0]);
    assert_errno(results.into_iter().next_back().unwrap(), ENOSPC);
    // Where it has its blocks already, it can still be written.
    file.write_all_at(&data, 65_536).unwrap();
    bytes[65_536..][..data.len()].copy_from_slice(&data);
    let mut shown = vec![0; 1 << 20];
    file.read_exact_at(&mut shown, 0).unwrap();
    assert!(shown == bytes[..1 << 20]);
    drop(file);
    export.stop(libc::SIGTERM).assert(0, &[]);
    assert!(fs::read(&path).unwrap()[..1 << 20] == bytes[..1 << 20]);
}

/// A disk whose third MiB fails, and whose flush may fail, as an NBD server shows it. The words are
/// a shell's; the plugin gives them the length as $3 and the offset as $4.
fn broken_server(case: &Case, flush: &str) -> (Server, Address) {
    const BAD: &str = "[ $(($4 + $3)) -le 2097152 ] || [ $4 -ge 3145728 ]";
    let address = Address::unix(&case.sandbox);
    let words = [
        "eval".to_owned(),
        format!("get_size=echo {SIZE}"),
        format!("pread={BAD} || {{ echo EPERM >&2; exit 1; }}; head -c $3 /dev/zero"),
        format!("pwrite=cat >/dev/null; {BAD} || {{ echo ENOSPC >&2; exit 1; }}"),
        format!("flush={flush}"),
    ];
    (Server::nbdkit(&address, words), address)
}

pub fn servers_error_fails_only_the_requests_that_touch_it(case: &Case) {
    let (_server, address) = broken_server(case, "exit 0");
    let mut export = export(case, Path::new(&address.uri("")), &[]);
    let file = File::options().read(true).write(true).open(export.file()).unwrap();
    // The page cache of some kernels makes EIO of every error (Linux 7.3).
    let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(export.file());
    let direct = direct.unwrap();
    let (good, bad) = (1 << 20, 2 << 20);
    std::thread::scope(|scope| {
        for client in 0..4 {
            let (file, direct) = (&file, &direct);
            scope.spawn(move || {
                for i in 0..10 {
                    let at = (client * 10 + i) * 4096;
                    let mut buf = [1; 4096];
                    assert_errno(direct.read_at(&mut Aligned::new(4096), bad + at), EPERM);
                    assert_errno(file.write_at(&buf, bad + at), ENOSPC);
                    assert_eq!(file.read_at(&mut buf, good + at).unwrap(), 4096);
                    assert!(buf == [0; 4096]);
                    assert_eq!(file.write_at(&buf, good + at).unwrap(), 4096);
                }
            });
        }
    });
    file.sync_all().unwrap();
    drop((file, direct));
    export.stop(libc::SIGTERM).assert(0, &[]);
}

pub fn servers_failed_flush_reaches_fsync_and_the_exit_status(case: &Case) {
    let (_server, address) = broken_server(case, "echo EIO >&2; exit 1");
    let mut export = export(case, Path::new(&address.uri("")), &[]);
    let file = File::options().write(true).open(export.file()).unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    assert_errno(file.sync_all(), EIO);
    drop(file);
    export.stop(libc::SIGTERM).assert(1, &["nbd.socket", "flush"]);
}
