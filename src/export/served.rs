//! What a connection to the kernel serves: one disk ([`Export`](super::Export)), or a directory of
//! them ([`Directory`](crate::directory::Directory)).

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::Cache;
use crate::backend::{Outage, WaitsFor};
use crate::errno::Errno;
use crate::fuse::notify::Notifier;
use crate::fuse::reply::Reply;
use crate::fuse::request::Op;
use crate::io::Io;

/// What the transports, the session and the control thread know of what they serve.
#[allow(async_fn_in_trait)] // requests stay on their thread, so no caller needs `Send` futures
pub trait Served: Send + Sync + 'static {
    /// How one thread reaches the bytes.
    type Lane: 'static;

    /// Makes the calling thread's lane. It is called once on each serving thread.
    fn lane(self: &Arc<Self>, io: &Rc<Io>) -> io::Result<Self::Lane>;

    /// What requests wait for.
    fn waits_for(&self) -> WaitsFor;

    /// The page cache in front of it.
    fn cache(&self) -> Cache;

    /// Whether writes are allowed.
    fn writable(&self) -> bool;

    /// Whether a length can change.
    fn growable(&self) -> bool;

    /// The size in bytes, now: of several disks, the sum.
    fn size(&self) -> u64;

    /// How the kernel is told of changes that its page cache does not know of; set before the first
    /// request.
    fn set_notifier(&self, notifier: Notifier);

    /// From now on so many bytes may be read ahead of each reader, see
    /// [`crate::backend::Backend::set_read_ahead`].
    fn set_read_ahead(&self, bytes: u64);

    /// Carries out `op`, which is about `node`. A WRITE's data, and the name of a GETXATTR or
    /// LOOKUP, is at the front of `payload`; a READ's data, an attribute's value and the entries of
    /// a directory go there.
    async fn handle(
        &self,
        lane: &Self::Lane,
        node: u64,
        op: Op,
        payload: &mut [u8],
    ) -> Result<Reply, Errno>;

    /// How it stands with a source that cannot be reached now, see
    /// [`crate::backend::Backend::outage`]. Files of a directory tell the log by themselves.
    fn outage(&self) -> Option<Outage> {
        None
    }

    /// Whether somebody has a file open, in whatever mount namespace.
    fn is_open(&self) -> bool;

    /// With write-back: the kernel has been told the size, and files may be opened.
    fn size_is_known(&self) {}

    /// With write-back: the size, if the kernel has to be given it back.
    fn take_exceeded_size(&self) -> Option<u64> {
        None
    }

    /// Whether a flush has failed: data that a client believes written may be lost, so the exit
    /// status must say so.
    fn flush_failed(&self) -> bool;

    /// The end is near: nothing is to wait any more for a source that is away.
    fn hurry(&self);

    /// The end, when nobody is served any more: flushes what was written, and takes leave of the
    /// source. It blocks; a source that is away is waited for as long as `patience`.
    fn last_flush(&self, patience: Duration) -> io::Result<()>;

    /// What it tells of itself, as one line of JSON. It waits for nobody, whatever a source does.
    fn report(&self) -> Option<String>;
}
