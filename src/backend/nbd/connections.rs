//! The connections to a server: one to begin with, more when they are needed, shared by all lanes.
//!
//! A connection is driven by one lane, its *home*, on that lane's thread. A lane sends its requests
//! by its own connections, so that no hop stands between a request and its socket. It uses another
//! lane's
//!
//! * while it has none of its own, because there is not much to send or because there may be no
//!   more of them;
//! * when its own have a lot in flight, the server is slow, and another has less in flight. Servers
//!   work on a bounded number of requests of a connection at a time (16 in QEMU and nbdkit, one in
//!   nbd-server), so that what is more waits. A server that is fast is left alone: then it is the
//!   CPUs that are short, and a hop and small batches cost.
//!
//! More connections are opened in the background, where the server allows several
//! (`CAN_MULTI_CONN`): for a lane that has sent a few requests by others', and for one whose own
//! are slow. What the server does not let us have is done without.
//!
//! What happens when one is lost, and when all are, is told in [`returns`].

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use event_listener::Event;
use polling::Poller;
use slab::Slab;
use smol::channel::{self, Sender};
use smol::{Task, Timer, future};

use self::backoff::Backoff;
use super::Error;
use super::Options;
use super::abandoned::Abandoned;
use super::commands::Commands;
use super::connection::{BUSY, Connection, Driver};
use super::dial::{Agreed, Dialer, Opened};
use super::stream::SystemCalls;
use super::unflushed::Unflushed;
use super::wire::transmission_flag;
use crate::backend::{Outage, RemoteStats};
use crate::io::Io;
use crate::pool;

mod backoff;
mod returns;

/// After so many requests by other lanes' connections a lane asks for one of its own.
const GUEST: u32 = 16;
/// How long a further connection may take, in the background: a server that has no room for it may
/// just not answer.
const FURTHER_LIMIT: Duration = Duration::from_secs(5);
/// How many there are at most unless the user says otherwise: one for each CPU, within these
/// bounds. Fewer do not keep a server busy that is far away, and more are more than a server
/// expects of a client.
const DEFAULT_MOST: (usize, usize) = (4, 8);

/// All connections to an export. How it stands with them:
///
/// | | `shared.all` | `shared.outage` | `refuses` | a server is dialled |
/// |---|---|---|---|---|
/// | up | some | none | no | for one more, if `may_open` |
/// | away, requests wait | none | no failure | no | by the thread `redial` |
/// | away, requests fail | none | a failure, or the export ends (`is_hurried`) | yes | as before |
/// | away for good | none | a failure `for_good` | yes | never |
/// | another disk | none | the same, and `is_another` | yes | never |
/// | closed: `is_closed` | as it was | as it was | as it was | by the last flush, if none is left |
pub struct Connections {
    dialer: Dialer,
    agreed: Agreed,
    /// After so long without an answer a connection counts as lost.
    timeout: Option<Duration>,
    /// How long requests wait for a server that is gone. Zero: it is gone for good.
    reconnect_timeout: Duration,
    abandoned: Arc<Abandoned>,
    unflushed: Arc<Unflushed>,
    /// Counts the changes of `shared.all`, so that lanes need not look.
    version: AtomicUsize,
    /// One more may be opened, and none is being opened.
    may_open: AtomicBool,
    /// There is no connection, and requests do not wait for one.
    refuses: AtomicBool,
    /// How many requests wait for a connection.
    waiting: AtomicUsize,
    /// Notified when there is a connection again, or when requests are refused.
    changed: Event,
    /// Is told of the beginning and the end of an outage.
    control: OnceLock<Arc<Poller>>,
    /// Held while the disk is brought back.
    bringing_back: Mutex<()>,
    shared: Mutex<Shared>,
}

struct Shared {
    all: Vec<Member>,
    lanes: Slab<LaneState>,
    /// How many connections there may be.
    most: usize,
    /// It is over: one that is still being opened is not needed any more.
    is_closed: bool,
    /// The export is ending: nobody is to wait for a server any more.
    is_hurried: bool,
    /// Another disk was found in its place.
    is_another: bool,
    /// From the loss of the last connection to the return; how many wait is not kept there.
    outage: Option<Outage>,
    /// Before the first attempt to reach a server again that is there and of no use: it has not
    /// answered by the connection that was lost.
    backoff: Backoff,
    /// Those of connections that are gone.
    system_calls: SystemCalls,
    lost: u64,
    /// How often the server came back.
    returns: u64,
}

struct Member {
    connection: Arc<Connection>,
    /// The lane that drives it.
    home: Option<usize>,
}

/// What is known of a lane.
struct LaneState {
    drive: Sender<Arc<Connection>>,
    /// Its thread serves a queue of the kernel's. Where there are such threads, the others hardly
    /// serve anything.
    sleeps_in_ring: bool,
}

impl Connections {
    /// Those of `first`'s export.
    pub fn new(
        dialer: Dialer,
        first: Arc<Connection>,
        options: &Options,
    ) -> Result<Arc<Connections>, Error> {
        let agreed = first.agreed().clone();
        let most = match agreed.has(transmission_flag::CAN_MULTI_CONN) {
            true => options.most_connections(),
            false => 1,
        };
        // What could never be dropped is not kept.
        let has_flush = agreed.has(transmission_flag::SEND_FLUSH);
        let is_written = has_flush && !agreed.has(transmission_flag::READ_ONLY);
        let kept_bytes = if is_written { options.unflushed } else { 0 };
        let unflushed =
            Unflushed::new(kept_bytes).map_err(|source| Error::NoMemory { kept_bytes, source })?;
        Ok(Arc::new(Connections {
            dialer,
            abandoned: first.abandoned().clone(),
            agreed,
            timeout: options.timeout,
            reconnect_timeout: options.reconnect_timeout,
            unflushed,
            version: AtomicUsize::new(1),
            may_open: AtomicBool::new(most > 1),
            refuses: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            changed: Event::new(),
            control: OnceLock::new(),
            bringing_back: Mutex::default(),
            shared: Mutex::new(Shared {
                all: vec![Member { connection: first, home: None }],
                lanes: Slab::new(),
                most,
                is_closed: false,
                is_hurried: false,
                is_another: false,
                outage: None,
                backoff: Backoff::default(),
                system_calls: SystemCalls::default(),
                lost: 0,
                returns: 0,
            }),
        }))
    }

    /// Requests that nobody waits for any more.
    pub fn abandoned(&self) -> &Arc<Abandoned> {
        &self.abandoned
    }

    /// What is acknowledged and not durable.
    pub fn unflushed(&self) -> &Arc<Unflushed> {
        &self.unflushed
    }

    /// The system calls on all sockets so far.
    pub fn system_calls(&self) -> SystemCalls {
        let shared = self.shared();
        let each = shared.all.iter().map(|member| member.connection.system_calls());
        each.fold(shared.system_calls, SystemCalls::plus)
    }

    /// Adds what is known here.
    pub fn add_stats(&self, stats: &mut RemoteStats) {
        stats.waiting = self.waiting.load(Ordering::Relaxed);
        stats.unflushed_bytes = self.unflushed.bytes();
        let shared = self.shared();
        stats.connections = shared.all.iter().filter(|one| !one.connection.is_lost()).count();
        stats.lost_connections = shared.lost;
        stats.reconnects = shared.returns;
    }

    /// How it stands while there is no connection.
    pub fn outage(&self) -> Option<Outage> {
        let outage = self.shared().outage.clone()?;
        Some(Outage { waiting: self.waiting.load(Ordering::Relaxed), ..outage })
    }

    /// Who is told of the beginning and the end of an outage.
    pub fn set_control(&self, control: Arc<Poller>) {
        let _ = self.control.set(control);
    }

    /// What was agreed on with the server.
    pub fn agreed(&self) -> &Agreed {
        &self.agreed
    }

    /// All there are; one that was lost a moment ago may be among them.
    pub fn all(&self) -> Vec<Arc<Connection>> {
        self.shared().all.iter().map(|member| member.connection.clone()).collect()
    }

    /// All there are, and there will be no more.
    pub fn close(&self) -> Vec<Arc<Connection>> {
        self.shared().is_closed = true;
        let _brought_back = self.bringing_back.lock().expect("no code panics while it is held");
        self.all()
    }

    /// Those that the calling thread's lane uses. It drives those whose home it is.
    pub fn lane(self: &Arc<Self>, io: &Rc<Io>) -> Rc<LaneConnections> {
        let (drive, receiver) = channel::unbounded();
        let lane = {
            let mut shared = self.shared();
            let lane =
                shared.lanes.insert(LaneState { drive, sleeps_in_ring: io.sleeps_in_ring() });
            shared.find_homes();
            self.version.fetch_add(1, Ordering::Release);
            lane
        };
        let drivers = Rc::new(RefCell::new(Vec::new()));
        // Weak, or the executor would hold the task, and the task the executor.
        let (io_of_lane, drivers_of_lane) = (Rc::downgrade(io), Rc::downgrade(&drivers));
        let connections = self.clone();
        let driving = io.spawn(async move {
            while let Ok(connection) = receiver.recv().await {
                let (Some(io), Some(drivers)) = (io_of_lane.upgrade(), drivers_of_lane.upgrade())
                else {
                    continue;
                };
                let (all, lost) = (connections.clone(), connection.clone());
                let on_loss = move |reason: &str| all.lost(&lost, reason);
                let driver = connection.driver(&io, connections.timeout, on_loss);
                drivers.borrow_mut().retain(|driver: &Driver| !driver.is_over());
                drivers.borrow_mut().push(driver);
            }
        });
        Rc::new(LaneConnections {
            connections: self.clone(),
            lane,
            version: Cell::new(0),
            own: RefCell::default(),
            all: RefCell::default(),
            guest: Cell::new(0),
            drivers,
            _driving: driving,
            _io: io.clone(),
        })
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("no code panics while it holds the connections")
    }

    /// Opens one more in the background, if there may be one: for `lane`, or for another if that
    /// has its share.
    fn open_another(self: &Arc<Self>, lane: usize) {
        if !self.may_open.load(Ordering::Relaxed) || !self.may_open.swap(false, Ordering::AcqRel) {
            return;
        }
        let connections = self.clone();
        pool::start(move || match connections.open_beside() {
            Ok(connection) => connections.add(connection, lane),
            Err(why) => {
                log::info!("no more than {} connections: {why}", connections.all().len());
            }
        });
    }

    /// Opens one to the server that the others are to.
    fn open_beside(&self) -> Result<Arc<Connection>, String> {
        let opened = self.dialer.open_within(FURTHER_LIMIT).map_err(|e| e.to_string())?;
        if let Some(difference) = self.agreed.difference(&opened.agreed) {
            return Err(format!("the export is another one there: {difference}"));
        }
        // It has come back so meanwhile.
        if !opened.agreed.has(transmission_flag::CAN_MULTI_CONN) {
            return Err("the server has no CAN_MULTI_CONN any more".into());
        }
        let connection = self.connection(opened);
        let older = self.all().into_iter().find(|older| !older.is_lost());
        let answered = older.is_some_and(|older| {
            let mut block = vec![0; self.agreed.block_sizes.minimum as usize];
            let asked = async { Commands::over(older).read(0, &mut block).await.is_ok() };
            let limit = async {
                Timer::after(FURTHER_LIMIT).await;
                false
            };
            smol::block_on(future::or(asked, limit))
        });
        if answered { Ok(connection) } else { Err("the others do not answer".into()) }
    }

    fn connection(&self, opened: Opened) -> Arc<Connection> {
        Connection::new(self.dialer.uri().to_string(), opened, self.abandoned.clone())
    }

    /// One more, which `for_lane` has asked for.
    pub fn add(&self, connection: Arc<Connection>, for_lane: usize) {
        let mut shared = self.shared();
        if shared.is_closed || shared.all.is_empty() || shared.all.len() >= shared.most {
            return connection.disconnect();
        }
        let home = shared.home_for(for_lane);
        if let Some(home) = home {
            shared.drive(home, &connection);
        }
        shared.all.push(Member { connection, home });
        log::debug!("{} connections", shared.all.len());
        self.may_open.store(shared.all.len() < shared.most, Ordering::Release);
        self.version.fetch_add(1, Ordering::Release);
        drop(shared);
        // Some may wait: the last one was lost, and that is not noted yet.
        self.changed.notify(usize::MAX);
    }
}

impl Shared {
    fn connections_of(&self, lane: usize) -> usize {
        self.all.iter().filter(|member| member.home == Some(lane)).count()
    }

    /// The lanes that are homes: those of the kernel's queues, where there are any.
    fn homes(&self) -> impl Iterator<Item = usize> {
        let any_ring = self.lanes.iter().any(|(_, home)| home.sleeps_in_ring);
        let is_home = move |home: &LaneState| home.sleeps_in_ring || !any_ring;
        self.lanes.iter().filter(move |(_, home)| is_home(home)).map(|(lane, _)| lane)
    }

    /// The lane that is to drive a connection which `lane` has asked for: itself, up to its share
    /// of them.
    fn home_for(&self, lane: usize) -> Option<usize> {
        let share = self.most.div_ceil(self.homes().count().max(1));
        if self.homes().any(|home| home == lane) && self.connections_of(lane) < share {
            return Some(lane);
        }
        self.homes().min_by_key(|home| self.connections_of(*home))
    }

    /// Gives each connection that has none a home, if there is one.
    fn find_homes(&mut self) {
        for i in 0..self.all.len() {
            if self.all[i].home.is_none() {
                let home = self.homes().min_by_key(|home| self.connections_of(*home));
                self.all[i].home = home;
                if let Some(home) = home {
                    self.drive(home, &self.all[i].connection);
                }
            }
        }
    }

    fn drive(&self, home: usize, connection: &Arc<Connection>) {
        // The channel is open as long as the lane is known.
        let _ = self.lanes[home].drive.try_send(connection.clone());
    }
}

/// Unless the user says otherwise.
pub fn default_most() -> usize {
    let (least, most) = DEFAULT_MOST;
    std::thread::available_parallelism().map_or(least, |cpus| cpus.get().clamp(least, most))
}

/// The connections as one lane uses them.
pub struct LaneConnections {
    connections: Arc<Connections>,
    lane: usize,
    /// That of `own` and `all`.
    version: Cell<usize>,
    own: RefCell<Vec<Arc<Connection>>>,
    all: RefCell<Vec<Arc<Connection>>>,
    /// How many requests have gone by other lanes' connections while there was none of its own.
    guest: Cell<u32>,
    drivers: Rc<RefCell<Vec<Driver>>>,
    _driving: Task<()>,
    /// The task finds it alive as long as it is polled.
    _io: Rc<Io>,
}

impl LaneConnections {
    /// What was agreed on with the server.
    pub fn agreed(&self) -> &Agreed {
        self.connections.agreed()
    }

    /// What is acknowledged and not durable.
    pub fn unflushed(&self) -> &Arc<Unflushed> {
        &self.connections.unflushed
    }

    /// A request has been lost with its connection once more, the first time at `first`: waits
    /// until it is to be sent again.
    pub async fn try_again(&self, first: Instant, times: u32) -> io::Result<()> {
        self.connections.try_again(first, times).await
    }

    /// The connection for the next request. Waits while the server is away, and fails with
    /// `NotConnected` when it has been so for too long.
    pub async fn pick(&self) -> io::Result<Arc<Connection>> {
        loop {
            if let Some(connection) = self.pick_now() {
                return Ok(connection);
            }
            self.connections.returned().await?;
        }
    }

    fn pick_now(&self) -> Option<Arc<Connection>> {
        let version = self.connections.version.load(Ordering::Acquire);
        if self.version.replace(version) != version {
            self.look();
        }
        let own = self.own.borrow();
        let best = least_loaded(&own);
        if let Some(best) = best
            && (best.load() < BUSY || !best.is_slow())
        {
            return Some(best.clone());
        }
        if best.is_none() {
            self.guest.set(self.guest.get().saturating_add(1));
        }
        if best.is_some() || self.guest.get() >= GUEST {
            self.connections.open_another(self.lane);
        }
        let all = self.all.borrow();
        match (best, least_loaded(&all)) {
            // A hop has its price.
            (Some(best), Some(other)) if other.load() * 2 >= best.load() => Some(best.clone()),
            (_, other) => other.cloned(),
        }
    }

    fn look(&self) {
        let shared = self.connections.shared();
        let all = shared.all.iter().map(|member| member.connection.clone());
        self.all.replace(all.collect());
        let own = shared.all.iter().filter(|member| member.home == Some(self.lane));
        self.own.replace(own.map(|member| member.connection.clone()).collect());
    }
}

fn least_loaded(connections: &[Arc<Connection>]) -> Option<&Arc<Connection>> {
    connections.iter().filter(|connection| !connection.is_lost()).min_by_key(|one| one.load())
}

impl Drop for LaneConnections {
    /// Others drive what this lane has driven.
    fn drop(&mut self) {
        self.drivers.borrow_mut().clear();
        let mut shared = self.connections.shared();
        shared.lanes.remove(self.lane);
        for member in &mut shared.all {
            if member.home == Some(self.lane) {
                member.home = None;
            }
        }
        shared.find_homes();
        self.connections.version.fetch_add(1, Ordering::Release);
    }
}
