//! What runs the program: the command line, the life of an export from start to end, and all that
//! surrounds it (signals, the background, logs, mount(8), systemd, a server of its own).
//!
//! Nothing here touches data: that is for the transports, the export and the backends.

pub mod ask;
pub mod cli;
pub mod daemon;
pub mod failure;
pub mod help;
pub mod hints;
pub mod info;
pub mod logging;
pub mod look;
pub mod mount_helper;
pub mod mounts;
pub mod own_folder;
pub mod privileges;
pub mod progress;
pub mod run;
pub mod server;
pub mod service;
pub mod signals;
pub mod top;
