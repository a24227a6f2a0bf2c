//! One file of the directory, connected or not.

use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use event_listener::Event;
use smol::lock::Mutex as AsyncMutex;

use crate::backend::Backend;
use crate::backend::nbd::{Found, NbdBackend};
use crate::errno::Errno;
use crate::export::{Attributes, Export, Served};
use crate::fuse::abi::Attr;

/// A file of the directory.
pub(super) struct File {
    /// That of its export.
    pub(super) name: String,
    /// Whoever connects to it, or disconnects from it, holds this until he is done.
    pub(super) turn: Arc<AsyncMutex<()>>,
    state: Mutex<State>,
}

struct State {
    /// In bytes, as last heard of.
    size: u64,
    /// While it is not connected.
    attributes: Attributes,
    connected: Option<Arc<Connected>>,
    /// Requests under way that need it connected, beside those of open files.
    uses: usize,
    last_use: Instant,
}

/// A file that is connected to its export.
pub(super) struct Connected {
    pub(super) export: Export<NbdBackend>,
    /// It is not any more: whoever keeps a way to it lets it go.
    pub(super) ended: Event,
}

impl File {
    pub(super) fn new(found: Found, attributes: Attributes) -> File {
        let state = State {
            size: found.size,
            attributes,
            connected: None,
            uses: 0,
            last_use: Instant::now(),
        };
        File { name: found.name, turn: Arc::default(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no code panics while it holds the state")
    }

    /// In bytes, as far as it is known.
    pub(super) fn size(&self) -> u64 {
        self.state().size
    }

    /// Those that it has kept.
    pub(super) fn attributes(&self) -> Attributes {
        self.state().attributes.clone()
    }

    pub(super) fn connected(&self) -> Option<Arc<Connected>> {
        self.state().connected.clone()
    }

    /// Whether this is what it is connected by.
    pub(super) fn is(&self, connected: &Arc<Connected>) -> bool {
        self.connected().is_some_and(|now| Arc::ptr_eq(&now, connected))
    }

    /// What `stat` shows of it as this node, and for how long that holds. Nobody is connected to
    /// for it, or waited for.
    pub(super) fn attr(&self, node: u64) -> Result<(Attr, Duration), Errno> {
        match self.connected() {
            Some(connected) => {
                let export = &connected.export;
                Ok(export.attr_of(export.backend().stat()?))
            }
            None => {
                let state = self.state();
                let (size, blocks) = (state.size, state.size.div_ceil(512));
                let attr = Attr { ino: node, size, blocks, ..state.attributes.of_file() };
                Ok((attr, Duration::ZERO))
            }
        }
    }

    /// It is connected from now on.
    pub(super) fn set_connected(&self, export: Export<NbdBackend>) -> Arc<Connected> {
        let connected = Arc::new(Connected { export, ended: Event::new() });
        let mut state = self.state();
        state.size = connected.export.size();
        state.last_use = Instant::now();
        state.connected = Some(connected.clone());
        connected
    }

    /// It is not any more.
    pub(super) fn set_disconnected(&self) {
        let mut state = self.state();
        if let Some(connected) = state.connected.take() {
            state.attributes = connected.export.kept_attributes();
        }
    }

    /// A request that needs it connected begins, in the turn of whoever has found it so.
    pub(super) fn begin_use(&self, connected: Arc<Connected>) -> Use<'_> {
        self.state().uses += 1;
        Use { file: self, connected }
    }

    /// Somebody has just used it.
    pub(super) fn note_use(&self) {
        self.state().last_use = Instant::now();
    }

    /// Since when nobody uses it, nor has it anything unsettled; none: it is in use. It stays so as long as the caller has its turn.
    pub(super) fn idle_since(&self, connected: &Connected) -> Option<Instant> {
        let state = self.state();
        let is_used = state.uses > 0
            || connected.export.is_open()
            || connected.export.backend().is_unsettled();
        (!is_used).then_some(state.last_use)
    }
}

/// A use of a connected file: it stays connected meanwhile.
pub(super) struct Use<'a> {
    file: &'a File,
    connected: Arc<Connected>,
}

impl Deref for Use<'_> {
    type Target = Arc<Connected>;

    fn deref(&self) -> &Arc<Connected> {
        &self.connected
    }
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        let mut state = self.file.state();
        state.uses -= 1;
        state.last_use = Instant::now();
    }
}
