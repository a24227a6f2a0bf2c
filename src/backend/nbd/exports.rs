//! All exports of one server: what there is, and each as a disk of its own.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use super::connection::Connection;
use super::connections::Connections;
use super::dial::{Dialer, Haggled, Handshake};
use super::error::Error;
use super::handshake::{Haggling, Listed};
use super::uri::Uri;
use super::wire::transmission_flag;
use super::{NbdBackend, Options};

/// An export that has to be opened for its size has this part of the time for all sizes, and no
/// more.
const SHARE: u32 = 5;
/// So many connections that were opened for a size are kept until all are known: nbd-server (3.24)
/// may hang when one client goes while the next one comes.
const HELD: usize = 64;

/// The exports of a server, each of which may be connected to. Certificates are read once, at the
/// start.
pub struct Exports {
    dialer: Dialer,
    options: Options,
}

/// An export, as far as its server tells without being made to open it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Empty for the default export.
    pub name: String,
    /// In bytes; zero also where the server does not tell.
    pub size: u64,
    /// `NBD_FLAG_READ_ONLY`
    pub read_only: bool,
}

impl Exports {
    /// Those of the server that `uri` names; the export name in it does not matter.
    pub fn new(uri: &Uri, options: &Options) -> Result<Exports, Error> {
        Ok(Exports { dialer: Dialer::new(uri, options)?, options: options.clone() })
    }

    /// The URI of one of them.
    pub fn uri(&self, name: &str) -> Uri {
        Uri { export: name.to_owned(), ..self.dialer.uri().clone() }
    }

    /// Connects to one of them, blocking.
    pub fn connect(&self, name: &str) -> Result<Arc<NbdBackend>, Error> {
        let dialer = self.dialer.to_export(name);
        let opened = dialer.open()?;
        let connection = Connection::new(dialer.uri().to_string(), opened, Arc::default());
        Ok(NbdBackend::over(Connections::new(dialer, connection, &self.options)?))
    }

    /// What there is, blocking: the server is asked on one connection. (One that does not tell a
    /// size so has the export opened.) A server that cannot be reached is tried again for as long
    /// as [`Options::open_timeout`]; for the sizes it has as much time as for a connection. An
    /// export of which nothing is told is listed all the same.
    pub fn list(&self) -> Result<Vec<Found>, Error> {
        let deadline = Instant::now() + self.options.open_timeout;
        let haggled = self.dialer.tried_until(deadline, || match self.dialer.haggle()? {
            Haggled::Options(mut haggling, _) => {
                let names = haggling.list()?;
                Ok((names, Some(haggling)))
            }
            // The old style has one export, and no name for it.
            Haggled::Older(_) => Ok((vec![Listed::default()], None)),
        });
        let (names, haggling) = haggled?;
        let deadline = Instant::now() + self.options.connect_timeout;
        let mut asking =
            Asking { exports: self, haggling, deadline, held: Vec::new(), silent: None };
        let mut seen = HashSet::new();
        let names = names.into_iter().map(|(name, _)| name);
        let names = names.filter(|name| seen.insert(name.clone()));
        let found = names.map(|name| asking.about(name)).collect();
        asking.end();
        Ok(found)
    }
}

/// Asks for one export after the other.
struct Asking<'a> {
    exports: &'a Exports,
    /// None: it was lost over the last one.
    haggling: Option<Haggling<Handshake>>,
    /// After it nobody is asked any more.
    deadline: Instant,
    /// See [`HELD`].
    held: Vec<Arc<Connection>>,
    /// How many have told nothing, the first of them, and why.
    silent: Option<(usize, String, String)>,
}

impl Asking<'_> {
    fn about(&mut self, name: String) -> Found {
        let unknown = Found { name, size: 0, read_only: false };
        if Instant::now() >= self.deadline {
            return self.tells_nothing(unknown, "there was no time left".into());
        }
        if self.haggling.is_none()
            && let Ok(Haggled::Options(haggling, _)) = self.exports.dialer.haggle()
        {
            self.haggling = Some(haggling);
        }
        let told = match &mut self.haggling {
            Some(haggling) => haggling.look(&unknown.name),
            None => Ok(None),
        };
        match told {
            Ok(Some(reply)) if reply.size > 0 => Found {
                size: reply.size,
                read_only: reply.flags & transmission_flag::READ_ONLY != 0,
                ..unknown
            },
            // nbd-server (3.24) tells the size zero for an export that it has not opened.
            Ok(_) => self.open(unknown),
            Err(error) => {
                if !matches!(error, Error::NoSuchExport { .. } | Error::Refused { .. }) {
                    self.haggling = None;
                }
                self.tells_nothing(unknown, error.to_string())
            }
        }
    }

    fn open(&mut self, unknown: Found) -> Found {
        let dialer = self.exports.dialer.to_export(&unknown.name);
        let left = self.deadline.saturating_duration_since(Instant::now());
        let share = self.exports.options.connect_timeout / SHARE;
        match dialer.open_within(left.min(share)) {
            Ok(opened) => {
                let size = opened.agreed.size;
                let read_only = opened.agreed.has(transmission_flag::READ_ONLY);
                let uri = dialer.uri().to_string();
                self.held.push(Connection::new(uri, opened, Arc::default()));
                if self.held.len() > HELD {
                    self.held.remove(0).disconnect();
                }
                Found { size, read_only, ..unknown }
            }
            Err(Error::SizeZero { .. }) => unknown,
            Err(error) => self.tells_nothing(unknown, error.to_string()),
        }
    }

    fn tells_nothing(&mut self, unknown: Found, why: String) -> Found {
        match &mut self.silent {
            Some((number, ..)) => *number += 1,
            None => self.silent = Some((1, unknown.name.clone(), why)),
        }
        unknown
    }

    fn end(self) {
        if let Some((number, first, why)) = self.silent {
            let uri = self.exports.dialer.uri();
            let more = number - 1;
            log::warn!("{uri}: nothing is known of its export '{first}', and {more} more: {why}");
        }
        self.held.iter().for_each(|connection| connection.disconnect());
        self.haggling.into_iter().for_each(Haggling::abort);
    }
}
