//! `-o rw` on what cannot be written.

use std::fs;

use libtest_mimic::Trial;

use crate::AS_USER;
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;

pub fn trials() -> Vec<Trial> {
    vec![trial("read_only/image_is_shown_so_with_a_warning".into(), vec!["user", "fuse"], image)]
}

fn image() {
    use std::os::unix::fs::PermissionsExt;
    for (options, is_told) in [("rw", true), ("ro,rw", true), ("ro", false), ("nofail", false)] {
        let sandbox = Sandbox::new();
        let image = sandbox.join("image");
        fs::write(&image, [0; 4096]).unwrap();
        let mut command = AS_USER(&sandbox);
        fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).unwrap();
        command.arg(sandbox.join("diskfuse")).args(["-o", options]);
        command.args(["--run", "! (echo x 1<> $DISKFUSE_FILE) 2>/dev/null"]).arg(&image);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{options}: {said}");
        for words in ["image: shown read-only", "Permission denied", "make it writable", "-o ro"] {
            assert_eq!(said.contains(words), is_told, "{options}: {words}: {said}");
        }
    }
}
