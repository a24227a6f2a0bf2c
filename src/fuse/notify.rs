//! What the kernel is told without having asked.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use super::abi::{self, NotifyInvalInodeOut, OutHeader, Plain};
use crate::{pool, sys};

/// A way to the kernel's side of the connection.
#[derive(Clone, Debug)]
pub struct Notifier {
    device: Arc<OwnedFd>,
}

impl Notifier {
    /// By a descriptor of the connection.
    pub fn new(device: OwnedFd) -> Notifier {
        Notifier { device: Arc::new(device) }
    }

    /// Drops what the page cache holds of a range of the file. A length of zero means up to the
    /// end.
    ///
    /// By the pool, since the kernel waits for pages that are being read or written, which may need
    /// the calling thread. So never on behalf of a request whose client holds pages locked: that of
    /// a WRITE through the cache.
    pub async fn invalidate(&self, offset: u64, len: u64) -> io::Result<()> {
        let device = self.device.clone();
        pool::run(move || {
            let range = NotifyInvalInodeOut {
                ino: abi::ROOT_ID,
                off: offset as i64,
                len: i64::try_from(len).unwrap_or(0),
            };
            let len = (size_of::<OutHeader>() + size_of::<NotifyInvalInodeOut>()) as u32;
            let header = OutHeader { len, error: abi::NOTIFY_INVAL_INODE, unique: 0 };
            match sys::write_two(&device.as_fd(), header.as_bytes(), range.as_bytes()) {
                Ok(_) => Ok(()),
                // It has no such inode in use: nothing is cached.
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
                Err(e) => Err(e),
            }
        })
        .await
    }
}
