//! A folder of a test's own.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A folder that is removed with all that is in it, and whatever is mounted there.
pub struct Sandbox(PathBuf);

impl Sandbox {
    pub fn new() -> Sandbox {
        Sandbox::below(&std::env::temp_dir())
    }

    pub fn below(folder: &Path) -> Sandbox {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!("diskfuse-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        // mountinfo has it without links.
        Sandbox(path.canonicalize().expect("it was just made"))
    }

    /// Gives the folder to an ordinary user.
    pub fn give_to(&self, user: u32) {
        std::os::unix::fs::chown(&self.0, Some(user), Some(user)).expect("root may give away");
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Names of all that is in it.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).expect("it exists");
        let mut names: Vec<String> = entries
            .map(|e| e.expect("readable").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        super::mounts::take_away_below(&self.0);
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{}: left behind: {e}", self.0.display());
        }
    }
}

/// A tmpfs with little space, unmounted when dropped.
pub struct Tight(Sandbox);

impl Tight {
    pub fn new(size: usize) -> Tight {
        let folder = Sandbox::new();
        let data = std::ffi::CString::new(format!("size={size}")).expect("no zero byte");
        mount("none", folder.path(), "tmpfs", MountFlags::empty(), Some(data.as_c_str())).unwrap();
        Tight(folder)
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Tight {
    fn drop(&mut self) {
        if let Err(e) = unmount(self.0.path(), UnmountFlags::DETACH) {
            eprintln!("{}: {e}", self.0.path().display());
        }
    }
}
