//! What the kernel is told without having asked.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

use super::abi::{self, NotifyInvalInodeOut, OutHeader, Plain};
use crate::pool;

/// A way to the kernel's side of the connection, about one node of it.
#[derive(Clone, Debug)]
pub struct Notifier {
    device: Arc<OwnedFd>,
    node: u64,
    writes_back_before_direct: bool,
}

impl Notifier {
    /// By a descriptor of the connection; about its root.
    pub fn new(device: OwnedFd, writes_back_before_direct: bool) -> Notifier {
        Notifier { device: Arc::new(device), node: abi::ROOT_ID, writes_back_before_direct }
    }

    /// The same about another node.
    pub fn about(&self, node: u64) -> Notifier {
        Notifier { node, ..self.clone() }
    }

    /// Whether the kernel writes dirty pages back before it reads or writes a file that was opened
    /// with `FOPEN_DIRECT_IO`: since Linux 6.6. Before, such a read misses them, and they overwrite
    /// what such a write has written.
    pub fn writes_back_before_direct(&self) -> bool {
        self.writes_back_before_direct
    }

    /// Drops what the page cache holds of a range of the file. A length of zero means up to the
    /// end.
    ///
    /// By the pool, since the kernel waits for pages that are being read or written, which may need
    /// the calling thread. So never on behalf of a request whose client holds pages locked: that of
    /// a WRITE through the cache.
    pub async fn invalidate(&self, offset: u64, len: u64) -> io::Result<()> {
        let (device, ino) = (self.device.clone(), self.node);
        pool::run(move || {
            let range = NotifyInvalInodeOut {
                ino,
                off: offset as i64,
                len: i64::try_from(len).unwrap_or(0),
            };
            let len = (size_of::<OutHeader>() + size_of::<NotifyInvalInodeOut>()) as u32;
            let header = OutHeader { len, error: abi::NOTIFY_INVAL_INODE, unique: 0 };
            let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(range.as_bytes())];
            match rustix::io::writev(&device, &parts) {
                Ok(_) => Ok(()),
                // It has no such inode in use: nothing is cached.
                Err(Errno::NOENT) => Ok(()),
                Err(e) => Err(e.into()),
            }
        })
        .await
    }
}
