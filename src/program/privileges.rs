//! What the process may do while it serves: no more than that and the unmount take.
//!
//! A remote server's bytes are taken apart here, beside root's capabilities. Those that nothing
//! here needs are given up before the first thread is started, for all of them; nothing can bring
//! them back, but for the command of `--run`, which is a program like any other.

use std::io;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities, set_no_new_privs};

/// Mounting, unmounting and aborting; and a source, a mountpoint and a pidfile in folders of other
/// users.
const NEEDED: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER);
/// So that the command is no I/O flusher, and can be signalled whoever it has become.
const FOR_A_COMMAND: CapabilitySet = CapabilitySet::SYS_RESOURCE.union(CapabilitySet::KILL);

/// Gives up what is not needed; `command`: `--run` is to start one, `server`: there is one that
/// will have to be ended. Root only: an ordinary user has nothing to give up, and `fusermount3` is
/// to be set-user-ID.
pub fn give_up(command: bool, server: bool) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let mut needed = NEEDED;
    if command {
        needed |= FOR_A_COMMAND;
    }
    if server {
        needed |= CapabilitySet::KILL;
    }
    let mut sets = capabilities(None)?;
    sets.effective &= needed;
    sets.permitted &= needed;
    set_capabilities(None, sets)?;
    // The command may want to run sudo.
    if !command {
        set_no_new_privs(true)?;
    }
    Ok(())
}
