//! Why an export could not be reached, in words that name the cause and, where there is one, the
//! cure.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// An error before the first request: everything later is a plain [`io::Error`].
#[derive(Debug)]
pub enum Error {
    /// The URI makes no sense; the text says where.
    Uri(String),
    /// No connection to the address.
    Connect {
        /// The address as the user knows it.
        to: String,
        /// What the system said.
        source: io::Error,
    },
    /// The server accepted the connection, then took too long over the handshake.
    Silent {
        /// How long was waited.
        after: Duration,
    },
    /// The connection broke during the handshake.
    Broken(io::Error),
    /// What answers does not speak NBD, or not properly.
    Protocol(String),
    /// The server has no export of this name.
    NoSuchExport {
        /// The name that was asked for.
        name: String,
        /// The names that it has, if it tells them.
        existing: Vec<String>,
    },
    /// The server knows the request and refuses it.
    Refused {
        /// What was asked for.
        what: &'static str,
        /// The server's reason.
        reason: String,
    },
    /// The server speaks to TLS clients only.
    TlsRequired,
    /// `nbds` was asked for and the server has no TLS.
    TlsRefused(String),
    /// The TLS handshake failed: most often the certificate.
    Tls(String),
    /// A certificate or key on this side cannot be used.
    Certificates {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The export has no bytes.
    SizeZero {
        /// Its name.
        name: String,
    },
    /// The export is longer than any file.
    TooLong {
        /// The export's size in bytes.
        size: u64,
    },
    /// No memory for what is not flushed.
    NoMemory {
        /// As much as was wanted.
        kept_bytes: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The last bytes of the export lie in an incomplete block, which no request can reach.
    Tail {
        /// The export's size in bytes.
        size: u64,
        /// The server's minimum block size in bytes.
        minimum: u32,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Uri(reason) => write!(f, "not a valid NBD URI: {reason}"),
            Error::Connect { to, source } => {
                write!(f, "cannot connect to {to}: {}", Plain(source))?;
                match source.kind() {
                    io::ErrorKind::ConnectionRefused => {
                        f.write_str(" (is an NBD server listening there?)")
                    }
                    io::ErrorKind::NotFound => f.write_str(" (there is no such socket)"),
                    _ => Ok(()),
                }
            }
            Error::Silent { after } => write!(
                f,
                "the server has not answered, or not to the end, within {} s: is this an NBD server, \
                 and has it room for one more client?",
                after.as_secs_f32()
            ),
            Error::Broken(source) if source.kind() == io::ErrorKind::UnexpectedEof => f.write_str(
                "the server closed the connection during the handshake: its log may say why",
            ),
            Error::Broken(source) => {
                write!(f, "the connection broke during the handshake: {}", Plain(source))
            }
            Error::Protocol(reason) => {
                write!(f, "the server does not keep to the protocol: {reason}")
            }
            Error::NoSuchExport { name, existing } if existing.contains(name) => write!(
                f,
                "the server lists its export {} and does not open it: its log may say why",
                Named(name)
            ),
            Error::NoSuchExport { name, existing } => {
                write!(f, "the server has no export named {}", Named(name))?;
                for (at, name) in existing.iter().take(20).enumerate() {
                    write!(f, "{}{}", if at == 0 { "; it has " } else { ", " }, Named(name))?;
                }
                match existing.len().saturating_sub(20) {
                    0 => Ok(()),
                    more => write!(f, " and {more} more"),
                }
            }
            Error::Refused { what, reason } => write!(f, "the server refuses {what}: {reason}"),
            Error::TlsRequired => f.write_str("the server requires TLS: use nbds:// for nbd://"),
            Error::TlsRefused(reason) => write!(
                f,
                "the server has no TLS ({reason}): nbds:// never falls back to plain text, so \
                 configure TLS there or use nbd://"
            ),
            Error::Tls(reason) => write!(f, "TLS failed: {reason}"),
            Error::Certificates { path, reason } => write!(f, "{}: {reason}", path.display()),
            Error::SizeZero { name } => write!(f, "the export {} has size zero", Named(name)),
            Error::TooLong { size } => write!(
                f,
                "the export's size of {size} bytes is more than a file can have, which is {} bytes",
                i64::MAX
            ),
            Error::NoMemory { kept_bytes, source } => write!(
                f,
                "no memory for {} MiB that are not flushed: {source} (a smaller --unflushed, or a \
                 larger ulimit -v)",
                kept_bytes >> 20
            ),
            Error::Tail { size, minimum } => write!(
                f,
                "the export's size of {size} bytes is not a multiple of the server's minimum block \
                 size of {minimum} bytes, so its last {} bytes cannot be reached: make the export \
                 larger or its blocks smaller",
                size % u64::from(*minimum)
            ),
        }
    }
}

/// The name of an export, which may be none.
struct Named<'a>(&'a str);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "" => f.write_str("'' (the default one)"),
            name => write!(f, "'{name}'"),
        }
    }
}

/// An [`io::Error`] as a lowercase clause, without the number in parentheses.
struct Plain<'a>(&'a io::Error);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.to_string();
        let text = text.split(" (os error").next().unwrap_or(&text);
        let mut chars = text.chars();
        match chars.next() {
            Some(first) => write!(f, "{}{}", first.to_lowercase(), chars.as_str()),
            None => f.write_str("unknown error"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Connect { source, .. } | Error::Broken(source) => Some(source),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_cause_and_cure() {
        let refused = Error::Connect {
            to: "host:10809".into(),
            source: io::Error::from_raw_os_error(libc::ECONNREFUSED),
        };
        assert_eq!(
            refused.to_string(),
            "cannot connect to host:10809: connection refused (is an NBD server listening there?)"
        );
        let tail = Error::Tail { size: 10_000, minimum: 4096 };
        assert!(tail.to_string().contains("10000") && tail.to_string().contains("1808 bytes"));
        let missing =
            Error::NoSuchExport { name: "a".into(), existing: vec!["b".into(), "c".into()] };
        assert_eq!(missing.to_string(), "the server has no export named 'a'; it has 'b', 'c'");
        let missing = |name: &str, existing: &[&str]| {
            let existing = existing.iter().map(|&name| name.into()).collect();
            Error::NoSuchExport { name: name.into(), existing }.to_string()
        };
        let default = "'' (the default one)";
        assert_eq!(
            missing("a", &[""]),
            format!("the server has no export named 'a'; it has {default}")
        );
        let refused = missing("", &["a", ""]);
        assert!(refused.contains(&format!("lists its export {default}")), "{refused}");
        assert!(Error::TlsRequired.to_string().contains("nbds://"));
    }
}
