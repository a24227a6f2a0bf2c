//! The connections to a server: one to begin with, more when they are needed, shared by all lanes.
//!
//! A connection is driven by one lane, its *home*, on that lane's thread. A lane sends its requests by its own
//! connections, so that no hop stands between a request and its socket. It uses another lane's
//!
//! * while it has none of its own, because there is not much to send or because there may be no more of them;
//! * when its own have a lot in flight, the server is slow, and another has less in flight. Servers work on a bounded number
//!   of requests of a connection at a time (16 in QEMU and nbdkit, one in nbd-server), so that what is more waits. A
//!   server that is fast is left alone: then it is the CPUs that are short, and a hop and small batches cost.
//!
//! More connections are opened in the background, where the server allows several (`CAN_MULTI_CONN`): for a lane that
//! has sent a few requests by others', and for one whose own are slow. What the server does not let us
//! have is done without. After a loss none is opened: the server may be another one, which has never had what this one has
//! acknowledged and not flushed.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use slab::Slab;
use smol::Task;
use smol::channel::{self, Sender};

use super::abandoned::Abandoned;
use super::connection::{BUSY, Connection, Driver};
use super::dial::{Dialer, Export};
use super::wire::transmission_flag;
use crate::io::Io;
use crate::pool;

/// After so many requests by other lanes' connections a lane asks for one of its own.
const GUEST: u32 = 16;
/// How long a further connection may take, in the background: a server that has no room for it may just not answer.
const FURTHER_LIMIT: Duration = Duration::from_secs(5);
/// How many there are at most unless the user says otherwise: one for each CPU, within these bounds. Fewer do not keep a server
/// busy that is far away, and more are more than a server expects of a client.
const DEFAULT_MOST: (usize, usize) = (4, 8);

/// All connections to an export.
pub struct Connections {
    dialer: Dialer,
    export: Export,
    abandoned: Arc<Abandoned>,
    /// Counts the changes of `shared.all`, so that lanes need not look.
    version: AtomicUsize,
    /// One more may be opened, and none is being opened.
    may_open: AtomicBool,
    shared: Mutex<Shared>,
}

struct Shared {
    all: Vec<Member>,
    lanes: Slab<Home>,
    /// How many connections there may be.
    most: usize,
    /// It is over: one that is still being opened is not needed any more.
    is_closed: bool,
}

struct Member {
    connection: Arc<Connection>,
    /// The lane that drives it.
    home: Option<usize>,
}

/// What is known of a lane.
struct Home {
    drive: Sender<Arc<Connection>>,
    /// Its thread serves a queue of the kernel's. Where there are such threads, the others hardly serve anything.
    sleeps_in_ring: bool,
}

impl Connections {
    /// Those of `first`'s export; `most` of them, or by the number of CPUs.
    pub fn new(dialer: Dialer, first: Arc<Connection>, most: Option<usize>) -> Arc<Connections> {
        let export = first.export().clone();
        let most = match export.has(transmission_flag::CAN_MULTI_CONN) {
            true => most.unwrap_or_else(default_most),
            false => 1,
        };
        Arc::new(Connections {
            dialer,
            abandoned: first.abandoned().clone(),
            export,
            version: AtomicUsize::new(1),
            may_open: AtomicBool::new(most > 1),
            shared: Mutex::new(Shared {
                all: vec![Member { connection: first, home: None }],
                lanes: Slab::new(),
                most,
                is_closed: false,
            }),
        })
    }

    /// What was agreed on with the server.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// All there are, lost ones included.
    pub fn all(&self) -> Vec<Arc<Connection>> {
        self.shared().all.iter().map(|member| member.connection.clone()).collect()
    }

    /// All there are, and there will be no more.
    pub fn close(&self) -> Vec<Arc<Connection>> {
        self.shared().is_closed = true;
        self.all()
    }

    /// The calling thread's way to them. It drives those that it is the home of.
    pub fn lane(self: &Arc<Self>, io: &Rc<Io>) -> Rc<Ways> {
        let (drive, receiver) = channel::unbounded();
        let lane = {
            let mut shared = self.shared();
            let lane = shared.lanes.insert(Home { drive, sleeps_in_ring: io.sleeps_in_ring() });
            shared.find_homes();
            self.version.fetch_add(1, Ordering::Release);
            lane
        };
        let drivers = Rc::new(RefCell::new(Vec::new()));
        // Weak, or the executor would hold the task, and the task the executor.
        let (io_of_lane, drivers_of_lane) = (Rc::downgrade(io), Rc::downgrade(&drivers));
        let driving = io.spawn(async move {
            while let Ok(connection) = receiver.recv().await {
                if let (Some(io), Some(drivers)) = (io_of_lane.upgrade(), drivers_of_lane.upgrade())
                {
                    drivers.borrow_mut().push(Connection::driver(&connection, &io));
                }
            }
        });
        Rc::new(Ways {
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

    /// Opens one more in the background, if there may be one: for `lane`, or for another if that has its share.
    fn open_another(self: &Arc<Self>, lane: usize) {
        if !self.may_open.load(Ordering::Relaxed) || !self.may_open.swap(false, Ordering::AcqRel) {
            return;
        }
        if self.shared().all.iter().any(|member| member.connection.is_lost()) {
            return;
        }
        let connections = self.clone();
        pool::start(move || {
            let opened = connections.dialer.open_further(FURTHER_LIMIT);
            let refused = match opened {
                Ok(opened) if opened.export.same_disk(&connections.export) => {
                    let name = connections.dialer.uri().to_string();
                    let connection = Connection::new(name, opened, connections.abandoned.clone());
                    return connections.add(connection, lane);
                }
                Ok(_) => "the export is another one there".into(),
                Err(error) => error.to_string(),
            };
            log::info!("no more than {} connections: {refused}", connections.all().len());
        });
    }

    /// One more, which `for_lane` has asked for.
    pub fn add(&self, connection: Arc<Connection>, for_lane: usize) {
        let mut shared = self.shared();
        if shared.is_closed {
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
    }
}

impl Shared {
    fn connections_of(&self, lane: usize) -> usize {
        self.all.iter().filter(|member| member.home == Some(lane)).count()
    }

    /// The lanes that are homes: those of the kernel's queues, where there are any.
    fn homes(&self) -> impl Iterator<Item = usize> {
        let any_ring = self.lanes.iter().any(|(_, home)| home.sleeps_in_ring);
        let is_home = move |home: &Home| home.sleeps_in_ring || !any_ring;
        self.lanes.iter().filter(move |(_, home)| is_home(home)).map(|(lane, _)| lane)
    }

    /// The lane that is to drive a connection which `lane` has asked for: itself, up to its share of them.
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

fn default_most() -> usize {
    let (least, most) = DEFAULT_MOST;
    std::thread::available_parallelism().map_or(least, |cpus| cpus.get().clamp(least, most))
}

/// One lane's way to the connections.
pub struct Ways {
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

impl Ways {
    /// What was agreed on with the server.
    pub fn export(&self) -> &Export {
        self.connections.export()
    }

    /// The connection for the next request.
    pub fn pick(&self) -> Arc<Connection> {
        let version = self.connections.version.load(Ordering::Acquire);
        if self.version.replace(version) != version {
            self.look();
        }
        let own = self.own.borrow();
        let best = least_loaded(&own);
        if let Some(best) = best
            && (best.load() < BUSY || !best.is_slow())
        {
            return best.clone();
        }
        let wants_more = best.is_some() || {
            self.guest.set(self.guest.get().saturating_add(1));
            self.guest.get() >= GUEST
        };
        if wants_more {
            self.connections.open_another(self.lane);
        }
        let all = self.all.borrow();
        match (best, least_loaded(&all)) {
            // A hop has its price.
            (Some(best), Some(other)) if other.load() * 2 >= best.load() => best.clone(),
            (_, Some(other)) => other.clone(),
            // All are lost: any will say so.
            (..) => all[0].clone(),
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

impl Drop for Ways {
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
