//! Who runs a connection's loops.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use smol::Task;

use super::Connection;
use crate::io::Io;

/// An offer to drive a connection: it does so while no earlier one does, and stops when it is
/// dropped.
pub struct Driver {
    pub(super) connection: Arc<Connection>,
    pub(super) number: u64,
    /// Not polled again once this is dropped.
    pub(super) _task: Task<()>,
    /// The task finds it alive as long as it is polled.
    pub(super) _io: Rc<Io>,
}

impl Driver {
    /// Whether the connection was lost.
    pub fn is_over(&self) -> bool {
        self.connection.is_lost()
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The executor may drop the task much later, or never: another may drive from here on.
        let driving = &self.connection.driving;
        if driving.compare_exchange(self.number, 0, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            self.connection.driver_left.notify(1);
        }
    }
}
