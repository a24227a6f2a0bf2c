//! A directory with a file for each export of an NBD server (`--all`).
//!
//! ```text
//!   node 1         the directory: the server's list, as it was at the start
//!   node 2, 3 ...  its files ── closed ──first open──> connected: an Export of its own
//!                                  ^                        │
//!                                  └── some time after the last close, when all is durable
//! ```
//!
//! A connected file is an [`Export`] as any other, with connections, a log of unflushed writes and
//! a last flush of its own; this module only finds it. One request in the way of another file's is
//! what must not be: connecting and the last flush, which wait for the server, are done on other
//! threads, one at a time for each file (its turn).

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use smol::Timer;

use crate::backend::nbd::{Error, Exports, Found, NbdBackend};
use crate::backend::{Backend, RemoteStats, WaitsFor};
use crate::errno::Errno;
use crate::export::report::{self, Reporter};
use crate::export::{Attributes, Cache, Export, Policy, Served};
use crate::fuse::abi::ROOT_ID;
use crate::fuse::notify::Notifier;
use crate::fuse::reply::Reply;
use crate::fuse::request::Op;
use crate::io::Io;
use crate::pool;
use file::{Connected, File, Use};

mod file;
mod names;
mod root;

#[cfg(test)]
mod tests;

/// The most files that are connected at a time, if there may be as many open sockets.
pub const MOST_CONNECTED: usize = 256;
/// How long a file stays connected when nobody uses it: programs open a file several times in a
/// row.
const IDLE: Duration = Duration::from_secs(5);
/// The node of the first file.
const FIRST: u64 = ROOT_ID + 1;

/// A server's exports as files.
pub struct Directory {
    exports: Exports,
    files: Vec<File>,
    /// The nodes by the names of the files.
    by_name: HashMap<String, u64>,
    policy: Policy,
    /// Its own; it has no others.
    attributes: Attributes,
    most_connected: usize,
    reporter: Reporter,
    /// See [`Export::new`].
    closed: Arc<AtomicBool>,
    notifier: OnceLock<Notifier>,
    read_ahead: AtomicU64,
    /// Nobody is to wait for the server any more.
    is_hurried: AtomicBool,
    /// A file that is not connected any more has lost something.
    has_lost: AtomicBool,
    connected: Mutex<ConnectedNodes>,
}

/// Which files are connected, or about to be.
#[derive(Debug, Default)]
struct ConnectedNodes {
    nodes: BTreeSet<u64>,
    /// Of those that were.
    past: RemoteStats,
}

/// One thread's ways to the files that it has had requests for.
pub struct Lanes {
    directory: Arc<Directory>,
    io: Rc<Io>,
    by_node: Rc<RefCell<HashMap<u64, Rc<FileLane>>>>,
}

struct FileLane {
    connected: Arc<Connected>,
    lane: <NbdBackend as Backend>::Lane,
}

impl Directory {
    /// Of these exports, no more than `most_connected` of them connected at a time. `closed` as for
    /// [`Export::new`].
    pub fn new(
        exports: Exports,
        found: Vec<Found>,
        policy: Policy,
        most_connected: usize,
        reporter: Reporter,
        closed: Arc<AtomicBool>,
    ) -> Directory {
        let (mut files, mut by_name) = (Vec::new(), HashMap::new());
        for found in found {
            let node = FIRST + files.len() as u64;
            if let Some(other) = by_name.insert(names::file_name(&found.name), node) {
                // Only where two names that are too long for a file have the same checksum.
                by_name.insert(names::file_name(&found.name), other);
                log::warn!("the export '{}' has no file: choose a shorter name", found.name);
                continue;
            }
            let writable = policy.writable && !found.read_only;
            files.push(File::new(found, Attributes::new(&Policy { writable, ..policy })));
        }
        Directory {
            exports,
            files,
            by_name,
            policy,
            attributes: Attributes::new(&policy),
            most_connected,
            reporter,
            closed,
            notifier: OnceLock::new(),
            read_ahead: AtomicU64::new(0),
            is_hurried: AtomicBool::new(false),
            has_lost: AtomicBool::new(false),
            connected: Mutex::default(),
        }
    }

    fn file(&self, node: u64) -> Option<&File> {
        self.files.get(usize::try_from(node.checked_sub(FIRST)?).ok()?)
    }

    fn connected(&self) -> MutexGuard<'_, ConnectedNodes> {
        self.connected.lock().expect("no code panics while it holds the nodes")
    }

    /// The files that are connected now.
    fn all_connected(&self) -> Vec<(u64, Arc<Connected>)> {
        let nodes: Vec<u64> = self.connected().nodes.iter().copied().collect();
        let file = |node| Some((node, self.file(node)?.connected()?));
        nodes.into_iter().filter_map(file).collect()
    }

    async fn handle_file(
        &self,
        lanes: &Lanes,
        node: u64,
        op: Op,
        payload: &mut [u8],
    ) -> Result<Reply, Errno> {
        let file = self.file(node).ok_or(Errno::ENOENT)?;
        match op {
            Op::Getattr { .. } => {
                let (attr, valid) = file.attr(node)?;
                Ok(Reply::Attr { attr, valid })
            }
            Op::Getxattr { room } => self.getxattr(Some(file), room, payload),
            Op::Statfs => Ok(Reply::Statfs(self.statfs())),
            Op::Open { .. } | Op::Setattr(_) => {
                let used = lanes.connect(node, file).await?;
                lanes.of(node, &used)?.handle(node, op, payload).await
            }
            _ => match file.connected() {
                Some(connected) => {
                    let answer = lanes.of(node, &connected)?.handle(node, op, payload).await;
                    if matches!(op, Op::Release { .. }) {
                        file.note_use();
                    }
                    answer
                }
                // Without connection there is no open file.
                None => Err(Errno::EIO),
            },
        }
    }

    /// Room for one more connected file, which another makes that nobody uses.
    async fn take_place(self: &Arc<Self>, node: u64) -> Result<Place, Errno> {
        loop {
            {
                let mut connected = self.connected();
                if connected.nodes.len() < self.most_connected {
                    connected.nodes.insert(node);
                    return Ok(Place { directory: self.clone(), node, is_kept: false });
                }
            }
            let idle = |(other, connected): (u64, Arc<Connected>)| {
                let since = self.file(other)?.idle_since(&connected)?;
                Some((since, other))
            };
            let mut idle: Vec<_> = self.all_connected().into_iter().filter_map(idle).collect();
            idle.sort_unstable();
            let mut has_room = false;
            for (_, other) in idle {
                has_room = self.give_back(other).await;
                if has_room {
                    break;
                }
            }
            if !has_room {
                log::error!(
                    "{}: not opened, {} files are connected, which is the most: close some of them",
                    self.uri_of(node),
                    self.most_connected
                );
                return Err(Errno::ENFILE);
            }
        }
    }

    /// Connects to it, in whose turn this is.
    async fn connect(self: &Arc<Self>, node: u64, file: &File) -> Result<Arc<Connected>, Errno> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(Errno::EIO);
        }
        let place = self.take_place(node).await?;
        let (directory, name) = (self.clone(), file.name.clone());
        let backend = pool::run(move || directory.exports.connect(&name)).await;
        let backend = backend.map_err(|e| {
            log::error!("{}: {e}", self.uri_of(node));
            match e {
                Error::NoSuchExport { name, existing } if !existing.contains(&name) => {
                    Errno::ENOENT
                }
                _ => Errno::EIO,
            }
        })?;
        backend.set_read_ahead(self.read_ahead.load(Ordering::Relaxed));
        let export = Export::new(backend, self.policy, self.closed.clone())?;
        let export = export.at_node(node, Some(file.attributes()));
        if let Some(notifier) = self.notifier.get() {
            export.set_notifier(notifier.about(node));
        }
        let reporter = Reporter { source: self.uri_of(node), ..self.reporter.clone() };
        export.set_reporter(reporter);
        let connected = file.set_connected(export);
        place.keep();
        // Whoever hurries the others has not seen it before.
        if self.is_hurried.load(Ordering::SeqCst) {
            connected.export.hurry();
        }
        Ok(connected)
    }

    /// Disconnects from a file that nobody uses, if that is so still; whether it was. Waits for the
    /// server, on another thread: also where nobody waits for this any more.
    async fn give_back(self: &Arc<Self>, node: u64) -> bool {
        let Some(turn) = self.file(node).and_then(|file| file.turn.try_lock_arc()) else {
            return false;
        };
        let directory = self.clone();
        pool::run(move || {
            let given_back = directory.disconnect_idle(node);
            drop(turn);
            given_back
        })
        .await
    }

    fn disconnect_idle(&self, node: u64) -> bool {
        let file = self.file(node).expect("it was connected");
        let Some(connected) = file.connected() else { return false };
        if file.idle_since(&connected).is_none() {
            return false;
        }
        // Nothing is unflushed, so that it waits for nothing.
        self.end(node, file, &connected, Duration::ZERO);
        true
    }

    /// Its last flush, and what it leaves behind.
    fn end(
        &self,
        node: u64,
        file: &File,
        connected: &Connected,
        patience: Duration,
    ) -> Option<io::Error> {
        let past = connected.export.backend().stats().unwrap_or_default().in_the_past();
        let flushed = connected.export.last_flush(patience);
        if let Err(e) = &flushed {
            log::error!("{}: the last flush failed, so writes may be lost: {e}", self.uri_of(node));
        }
        if flushed.is_err() || connected.export.flush_failed() {
            self.has_lost.store(true, Ordering::Relaxed);
        }
        file.set_disconnected();
        connected.ended.notify(usize::MAX);
        let mut all = self.connected();
        all.nodes.remove(&node);
        all.past = all.past.plus(past);
        flushed.err()
    }

    /// Gives a file back when nobody has used it for a time. It ends with that.
    async fn give_back_when_idle(self: Arc<Self>, node: u64, connected: Arc<Connected>) {
        let Some(file) = self.file(node) else { return };
        loop {
            let left = match file.idle_since(&connected) {
                Some(since) => IDLE.saturating_sub(since.elapsed()),
                None => IDLE,
            };
            if left.is_zero() {
                self.give_back(node).await;
                if !file.is(&connected) {
                    return;
                }
            }
            Timer::after(left.max(IDLE / 10)).await;
        }
    }
}

/// A file's place among those that are connected, until it is known that it is.
struct Place {
    directory: Arc<Directory>,
    node: u64,
    is_kept: bool,
}

impl Place {
    fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.is_kept {
            self.directory.connected().nodes.remove(&self.node);
        }
    }
}

impl Lanes {
    /// A use of the file, which is connected to for it if it is not.
    async fn connect<'a>(&self, node: u64, file: &'a File) -> Result<Use<'a>, Errno> {
        let _turn = file.turn.lock().await;
        if let Some(connected) = file.connected() {
            return Ok(file.begin_use(connected));
        }
        let connected = self.directory.connect(node, file).await?;
        let watch = self.directory.clone().give_back_when_idle(node, connected.clone());
        self.io.spawn(watch).detach();
        Ok(file.begin_use(connected))
    }

    /// The calling thread's way to a connected file.
    fn of(&self, node: u64, connected: &Arc<Connected>) -> io::Result<Rc<FileLane>> {
        let known = self.by_node.borrow().get(&node).cloned();
        if let Some(lane) = known
            && Arc::ptr_eq(&lane.connected, connected)
        {
            return Ok(lane);
        }
        let ended = connected.ended.listen();
        let lane = connected.export.backend().lane(&self.io)?;
        let lane = Rc::new(FileLane { connected: connected.clone(), lane });
        // What it was before is dropped when nothing is borrowed any more.
        let before = self.by_node.borrow_mut().insert(node, lane.clone());
        drop(before);
        let (lanes, ending) = (Rc::downgrade(&self.by_node), Arc::downgrade(connected));
        let forget = async move {
            ended.await;
            let Some(lanes) = lanes.upgrade() else { return };
            let is_it = lanes
                .borrow()
                .get(&node)
                .is_some_and(|lane| std::ptr::eq(Arc::as_ptr(&lane.connected), ending.as_ptr()));
            if is_it {
                let lane = lanes.borrow_mut().remove(&node);
                drop(lane);
            }
        };
        self.io.spawn(forget).detach();
        Ok(lane)
    }
}

impl FileLane {
    async fn handle(&self, node: u64, op: Op, payload: &mut [u8]) -> Result<Reply, Errno> {
        self.connected.export.handle(&self.lane, node, op, payload).await
    }
}

impl Served for Directory {
    type Lane = Lanes;

    fn lane(self: &Arc<Self>, io: &Rc<Io>) -> io::Result<Lanes> {
        Ok(Lanes { directory: self.clone(), io: io.clone(), by_node: Rc::default() })
    }

    fn waits_for(&self) -> WaitsFor {
        WaitsFor::Server
    }

    fn cache(&self) -> Cache {
        self.policy.cache
    }

    fn writable(&self) -> bool {
        self.policy.writable
    }

    fn growable(&self) -> bool {
        false
    }

    fn size(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.size()))
    }

    fn set_notifier(&self, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
    }

    fn set_read_ahead(&self, bytes: u64) {
        self.read_ahead.store(bytes, Ordering::Relaxed);
        let all = self.all_connected();
        all.iter().for_each(|(_, connected)| connected.export.set_read_ahead(bytes));
    }

    async fn handle(
        &self,
        lanes: &Lanes,
        node: u64,
        op: Op,
        payload: &mut [u8],
    ) -> Result<Reply, Errno> {
        match op {
            Op::Destroy => Ok(Reply::Done),
            Op::Unanswered | Op::Interrupt { .. } => Ok(Reply::Unanswered),
            Op::Listxattr { room } => crate::export::xattr(&[], 0, room, payload),
            _ if node == ROOT_ID => self.handle_root(op, payload),
            _ => self.handle_file(lanes, node, op, payload).await,
        }
    }

    fn is_open(&self) -> bool {
        self.all_connected().iter().any(|(_, connected)| connected.export.is_open())
    }

    fn flush_failed(&self) -> bool {
        self.has_lost.load(Ordering::Relaxed)
            || self.all_connected().iter().any(|(_, connected)| connected.export.flush_failed())
    }

    fn hurry(&self) {
        self.is_hurried.store(true, Ordering::SeqCst);
        self.all_connected().iter().for_each(|(_, connected)| connected.export.hurry());
    }

    /// Those of all connected files at once. The first failure is told, all are logged.
    fn last_flush(&self, patience: Duration) -> io::Result<()> {
        let nodes: Vec<u64> = self.connected().nodes.iter().copied().collect();
        let flush = |node: u64| {
            let file = self.file(node)?;
            // One that is being connected to has nothing yet.
            file.connected()?;
            // One that is being given back is waited for.
            let _turn = file.turn.lock_blocking();
            let connected = file.connected()?;
            self.end(node, file, &connected, patience)
        };
        let failed = std::thread::scope(|scope| {
            let each = nodes.iter().map(|&node| {
                let thread = std::thread::Builder::new().name("flush".into());
                // Without a thread it is done by this one.
                thread.spawn_scoped(scope, move || flush(node)).map_err(|_| node)
            });
            let all: Vec<_> = each.collect();
            let end = |one| match one {
                Ok(thread) => std::thread::ScopedJoinHandle::join(thread).unwrap_or_else(|_| {
                    Some(io::Error::other("the thread of a last flush has panicked"))
                }),
                Err(node) => flush(node),
            };
            all.into_iter().map(end).fold(None, Option::or)
        });
        failed.map_or(Ok(()), Err)
    }

    fn report(&self) -> Option<String> {
        let all = self.all_connected();
        let stats = all.iter().filter_map(|(_, connected)| connected.export.backend().stats());
        let past = self.connected().past;
        let nbd = stats.fold(past, RemoteStats::plus);
        let exports = report::Exports { listed: self.files.len(), connected: all.len() };
        Some(self.reporter.line(self.size(), Some(nbd), Some(exports)))
    }
}
