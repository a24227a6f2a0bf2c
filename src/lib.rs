//! diskfuse shows a disk as a file.
//!
//! ```text
//!                   kernel
//!        /dev/fuse |      | io_uring, a queue per CPU
//!   transport::legacy    transport::uring      one thread each, a LocalExecutor on it
//!                   \    /
//!                 slot::Slot                   the token for one request
//!                     |
//!            fuse::request::Op                 decoded
//!                     |
//!              export::Export                  what it means for a disk
//!                     |
//!              backend::Lane                   one thread's way to the bytes
//!              /            \
//!       backend::file    backend::nbd
//! ```
//!
//! Data flows one way: kernel → slot → request → export → backend → reply → kernel. A small request
//! stays on the thread of its CPU's queue; large ones are shared out between threads. The control
//! thread ([`program::run`]) mounts, waits for a signal or the end of the connection, and unmounts;
//! it never touches data.
//!
//! Where to find what:
//!
//! | to change | look at |
//! |---|---|
//! | an option, by `-o` too | [`program::cli`]: its `args`; `values` for bounds; man/diskfuse.1 |
//! | what only `-o` and fstab may say | `mount_options` of [`program::cli`] |
//! | what an export goes through from start to end | [`program::run`] |
//! | ... what ends it: signals, umount, the command of `--run` | its `supervise` and `stop` |
//! | the exit status | [`program::failure`]; --help: `error_code` in `args` of [`program::cli`] |
//! | an error's words | where it is found: [`mount::mountpoint`]; the modules of [`backend`] |
//! | `--info` and `--list`; `--mounts` | [`program::look`], [`program::info`]; [`program::mounts`] |
//! | `--top`: what it picks from the JSON | [`program::top`]: its `figures`, `drawing` and `terminal` |
//! | `--help`; what a word may have been meant as | [`program::help`]; [`program::hints`] |
//! | signals; the background and the pidfile | [`program::signals`]; [`program::daemon`] |
//! | what is logged where; what lasts, on a terminal | [`program::logging`]; [`program::progress`] |
//! | how mount(8) calls; what systemd is told | [`program::mount_helper`]; [`program::service`] |
//! | a server of our own, `[ COMMAND ]` | [`program::server`]; its words: `server` of [`program::cli`] |
//! | mounting, unmounting, what is found at the mountpoint | [`mount`] |
//! | what an operation of FUSE means, the cache modes | [`export`] |
//! | ... the size, truncation; mode, owner, times | its `size`; `attributes` |
//! | errors that an fsync has to tell | [`export::open_files`] |
//! | a directory of exports (`--all`) | [`directory`]; [`export::Served`] is what it shares with one disk |
//! | counters of requests | [`stats`] |
//! | counters of a server | [`backend::RemoteStats`]; each `add_stats` in [`backend::nbd`] fills it |
//! | how both are told | as JSON: [`export::report`]; as an xattr: `attributes` of [`export`] |
//! | the FUSE protocol, a new operation | [`fuse`], then [`export`] |
//! | a mode or a flag of an operation that is there | [`export`], then [`backend::Lane`] and who has it |
//! | what is negotiated with the kernel | `init` of [`session`] |
//! | how many threads there are | its `rings` and `workers` |
//! | how many requests a queue may have | its `rings`; how that grows: [`transport::uring`] |
//! | whether a thread polls | [`transport::pace`], made in `legacy` and `uring` |
//! | which thread serves a request | [`transport::queues`] |
//! | the two ways of requests | [`transport::legacy`], [`transport::uring`] |
//! | a request's memory | [`transport::slot`], [`transport::entries`] |
//! | interrupted clients | [`transport::interrupts`] |
//! | another kind of source | [`backend`], whose two traits it implements |
//! | ... on the command line | `Source` in [`program::cli`], and `parse_source` in its `values` |
//! | how far is read ahead | unless the user says: `values` of [`program::cli`] |
//! | ... by the kernel (root) or by us (others) | `start` in [`program::run`] |
//! | ... by us: how it grows; what all readers may take | `ahead::table`, `ahead` of [`backend::nbd`] |
//! | images and block devices; a part of a disk | [`backend::file`], its `lane`; [`backend::part`] |
//! | partition tables | [`partitions`] |
//! | the NBD client: its picture is in | [`backend::nbd`] |
//! | NBD: a URI's keys | [`backend::nbd::uri`]; for TLS: `Dialer::new` in `dial` hands them to `tls` |
//! | NBD: connecting, TLS, the handshake | its `dial`, `connect`, `tls`, `handshake` |
//! | NBD: a command | its `wire`, `commands`, `blocks` (alignment); `NbdLane` in its `mod` |
//! | NBD: lost connections | its `connections::returns` |
//! | ... how often it is tried again | its `connections::backoff`; at the start `dial` |
//! | NBD: what is written again | its `unflushed` |
//! | NBD: holes | its `holes`, `extents` |
//!
//! Modules that may use `unsafe`, and for what:
//!
//! | module | the fact it rests on |
//! |---|---|
//! | [`sys`] | arguments are values, or references that live for the call |
//! | [`fuse::abi`] | structures without padding, checked by size |
//! | [`io`] | no future that has a buffer is leaked, as whoever makes an [`io::Io`] promises |
//! | [`transport`] | a request's future owns the slot that it uses |
//! | [`transport::slot`] | each piece of the mapping has one owner |
//! | [`transport::ring`] | memory given to the kernel is not used until its completion is reaped |
//! | [`transport::entries`] | an entry's memory is moved in with the commit, and out with the completion |
//! | `backend::nbd::inflight` | a buffer is in the table only while a live request borrows it |
//! | `backend::nbd::{connection, commands}` | requests are not leaked: the promise of [`io`] |
//! | `backend::nbd::stream_copy` | vectors of bytes, aligned where they are written |
//! | [`pool`] | a buffer on loan stays borrowed until the work has ended |
//! | [`program::daemon`], main.rs | the process is split before it has a second thread |
//! | [`program::server`] | what becomes a server owns nothing but the standard streams |

pub mod backend;
pub mod directory;
pub mod errno;
pub mod export;
pub mod fuse;
pub mod io;
pub mod locks;
pub mod mount;
pub mod partitions;
pub mod pool;
pub mod printable;
pub mod program;
pub mod session;
pub mod stats;
pub mod sys;
pub mod transport;
