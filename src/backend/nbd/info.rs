//! What a server tells about its exports, for `--list` and `--info`.

use std::sync::Arc;

use super::connection::Connection;
use super::dial::{Dialer, Haggled};
use super::error::Error;
use super::handshake::{BlockSizes, ExportReply, Haggling, sane_flags};
use super::uri::Uri;
use super::wire::{Headers, transmission_flag as flag};
use super::{Options, handshake::BASE_ALLOCATION};

/// An export as its server describes it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ExportInfo {
    /// Empty for the default export.
    pub name: String,
    /// The server's words for people, if it has any.
    pub description: Option<String>,
    /// In bytes.
    pub size: u64,
    /// `NBD_FLAG_READ_ONLY`
    pub read_only: bool,
    /// `NBD_FLAG_ROTATIONAL`
    pub rotational: bool,
    /// `NBD_FLAG_SEND_FLUSH`
    pub can_flush: bool,
    /// `NBD_FLAG_SEND_FUA`
    pub can_fua: bool,
    /// `NBD_FLAG_SEND_TRIM`
    pub can_trim: bool,
    /// `NBD_FLAG_SEND_WRITE_ZEROES`
    pub can_write_zeroes: bool,
    /// `NBD_FLAG_SEND_FAST_ZERO`
    pub can_fast_zero: bool,
    /// `NBD_FLAG_SEND_DF`
    pub can_df: bool,
    /// `NBD_FLAG_SEND_CACHE`
    pub can_cache: bool,
    /// `NBD_FLAG_CAN_MULTI_CONN`
    pub can_multi_conn: bool,
    /// If the server tells them.
    pub block_sizes: Option<BlockSizes>,
    /// The metadata contexts, such as `base:allocation`.
    pub meta_contexts: Vec<String>,
    /// The connection was inside TLS.
    pub tls: bool,
    /// `simple`, `structured` or `extended`: the richest headers that the server agreed to.
    pub headers: &'static str,
    /// The server knows only `NBD_OPT_EXPORT_NAME` or the old style, which hides most of the above.
    pub older: bool,
}

impl ExportInfo {
    fn new(name: &str, reply: ExportReply, contexts: Vec<String>, tls: bool, h: Headers) -> Self {
        let flags = sane_flags(reply.flags);
        let has = |bit: u16| flags & bit != 0;
        ExportInfo {
            name: name.into(),
            description: reply.description.filter(|text| !text.is_empty()),
            size: reply.size,
            read_only: has(flag::READ_ONLY),
            rotational: has(flag::ROTATIONAL),
            can_flush: has(flag::SEND_FLUSH),
            can_fua: has(flag::SEND_FUA),
            can_trim: has(flag::SEND_TRIM),
            can_write_zeroes: has(flag::SEND_WRITE_ZEROES),
            can_fast_zero: has(flag::SEND_FAST_ZERO),
            can_df: has(flag::SEND_DF),
            can_cache: has(flag::SEND_CACHE),
            can_multi_conn: has(flag::CAN_MULTI_CONN),
            block_sizes: reply.block_sizes,
            meta_contexts: contexts,
            tls,
            headers: match h {
                Headers::Simple => "simple",
                Headers::Structured => "structured",
                Headers::Extended => "extended",
            },
            older: false,
        }
    }

    /// Whether holes can be told from data.
    pub fn has_base_allocation(&self) -> bool {
        self.meta_contexts.iter().any(|name| name == BASE_ALLOCATION)
    }
}

/// Describes the export that `uri` names.
pub fn info(uri: &Uri, options: &Options) -> Result<ExportInfo, Error> {
    let dialer = Dialer::new(uri, options)?;
    let Haggled::Options(mut haggling, headers) = dialer.haggle()? else { return older(&dialer) };
    let found = describe(&mut haggling, &uri.export, uri.tls, headers)?;
    haggling.abort();
    complete(found, &dialer)
}

/// Describes all exports of the server that `uri` names; the export name in it does not matter.
pub fn list(uri: &Uri, options: &Options) -> Result<Vec<ExportInfo>, Error> {
    let dialer = Dialer::new(uri, options)?;
    let Haggled::Options(mut haggling, headers) = dialer.haggle()? else {
        // The old style has one export, and no name for it.
        return Ok(vec![older(&dialer)?]);
    };
    let mut exports = Vec::new();
    for (name, description) in haggling.list()? {
        let mut found = match describe(&mut haggling, &name, uri.tls, headers) {
            Ok(found) => {
                let one = Uri { export: name, ..uri.clone() };
                complete(found, &Dialer::new(&one, options)?)?
            }
            // It may have gone since it was listed, or be refused to this client.
            Err(Error::NoSuchExport { .. } | Error::Refused { .. }) => {
                log::warn!("the server lists '{name}' but does not tell about it");
                continue;
            }
            Err(error) => return Err(error),
        };
        found.description = Some(description).filter(|text| !text.is_empty()).or(found.description);
        exports.push(found);
    }
    haggling.abort();
    Ok(exports)
}

/// `None` if the server knows no `NBD_OPT_INFO`.
fn describe<S: std::io::Read + std::io::Write>(
    haggling: &mut Haggling<S>,
    name: &str,
    tls: bool,
    headers: Headers,
) -> Result<Option<ExportInfo>, Error> {
    let Some(reply) = haggling.info(name)? else { return Ok(None) };
    let contexts = match headers {
        Headers::Simple => Vec::new(),
        Headers::Structured | Headers::Extended => haggling.list_meta_contexts(name)?,
    };
    Ok(Some(ExportInfo::new(name, reply, contexts, tls, headers)))
}

/// Asks in another way, on a connection of its own, where `NBD_OPT_INFO` told nothing, or too
/// little: nbd-server (3.24) tells the size zero for an export that it has not opened.
fn complete(found: Option<ExportInfo>, dialer: &Dialer) -> Result<ExportInfo, Error> {
    match found {
        None => older(dialer),
        Some(info) if info.size > 0 => Ok(info),
        Some(info) => match dialer.open() {
            Ok(opened) => {
                let size = opened.agreed.size;
                Connection::new(dialer.uri().to_string(), opened, Arc::default()).disconnect();
                Ok(ExportInfo { size, ..info })
            }
            Err(Error::SizeZero { .. }) => Ok(info),
            Err(error) => Err(error),
        },
    }
}

/// Opens the export only to look at it.
fn older(dialer: &Dialer) -> Result<ExportInfo, Error> {
    let opened = dialer.open()?;
    let agreed = opened.agreed.clone();
    let reply = ExportReply {
        size: agreed.size,
        flags: agreed.flags,
        block_sizes: None,
        description: None,
    };
    Connection::new(dialer.uri().to_string(), opened, Arc::default()).disconnect();
    let info = ExportInfo::new(&dialer.uri().export, reply, Vec::new(), false, agreed.headers);
    Ok(ExportInfo { older: true, ..info })
}
