use super::table::all_in;
use super::*;

const MOUNTS: &[u8] = b"\
22 1 254:0 / / rw,relatime - ext4 /dev/root rw
40 22 0:50 / /tmp/a\\040b rw,nosuid,nodev - fuse.diskfuse /img\\040x rw,user_id=0
41 22 0:51 / /tmp/c rw shared:1 master:2 - tmpfs tmpfs rw
42 41 0:52 / /tmp/c rw - fuse.diskfuse top rw
43 22 0:53 / /tmp/d rw - tmpfs other rw
44 42 254:1 / /tmp/c rw - ext4 /dev/loop0 rw
";

#[test]
fn finds_a_mount_by_its_path_with_spaces() {
    let found = entries_at(MOUNTS, Path::new("/tmp/a b"));
    let (fs_type, source) = (FS_TYPE.to_owned(), "/img x".to_owned());
    let device = rustix::fs::makedev(0, 50);
    let (is_read_only, is_slave) = (false, false);
    let path = "/tmp/a b".into();
    let entry = Entry { path, id: 40, parent: 22, device, fs_type, source, is_read_only, is_slave };
    assert_eq!(found, [entry]);
}

#[test]
fn all_mounts_of_this_program_are_found() {
    let all = all_in(MOUNTS);
    let found: Vec<_> = all.iter().map(|m| (m.path.to_str().unwrap(), m.is_covered)).collect();
    assert_eq!(found, [("/tmp/a b", false), ("/tmp/c", true)]);
    assert_eq!(all[0].source, "/img x");
}

#[test]
fn the_topmost_mount_counts() {
    assert_eq!(entries_at(MOUNTS, Path::new("/tmp/c")).pop().unwrap().id, 44);
    assert_eq!(entries_at(MOUNTS, Path::new("/tmp")), []);
}

#[test]
fn what_is_above_a_mount_is_found_by_its_device() {
    let here = entries_at(MOUNTS, Path::new("/tmp/c"));
    let above = |minor| {
        let found = entries_above(&here, rustix::fs::makedev(0, minor));
        found.iter().map(|entry| entry.id).collect::<Vec<_>>()
    };
    assert_eq!((above(51), above(52), above(53)), (vec![42, 44], vec![44], vec![]));
}

#[test]
fn a_missing_mountpoint_is_created_and_removed() {
    let folder = std::env::temp_dir().join(format!("diskfuse-mount-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let path = folder.join("disk");
    let mountpoint = Mountpoint::prepare(&path, Shape::File).unwrap();
    assert!(path.exists());
    drop(mountpoint);
    assert!(!path.exists());
    // But not when it has become somebody else's.
    let mountpoint = Mountpoint::prepare(&path, Shape::File).unwrap();
    fs::write(&path, "content").unwrap();
    drop(mountpoint);
    assert!(path.exists());
    fs::remove_dir_all(&folder).unwrap();
}
