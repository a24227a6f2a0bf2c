//! The values of options, with the bounds of each.

use std::path::PathBuf;
use std::time::Duration;

use super::server::{GivenServer, SERVER};
use super::{CacheWish, OnLoss, Source, Switch, UsageError, usage};
use crate::backend::nbd::Uri;
use crate::export::{Cache, Truncate};

/// How far to read ahead unless the user says otherwise, and at most, in bytes: what keeps a wire
/// of 400 MiB/s full at 10 ms, and what one reader may cost in memory.
const READ_AHEADS: (u64, u64) = (4 << 20, 1 << 30);
/// Connections to a server.
const CONNECTIONS: std::ops::RangeInclusive<usize> = 1..=256;
/// What is kept of writes that are not durable, in bytes. Less has no room for a few long requests.
const UNFLUSHED: std::ops::RangeInclusive<usize> = 4 << 20..=64 << 30;
/// Requests in flight: the ring's own limit is far above, memory is not.
const QUEUE_DEPTHS: std::ops::RangeInclusive<usize> = 1..=4096;

pub(super) fn parse_switch(
    option: &str,
    value: Option<&str>,
    default: Switch,
) -> Result<Switch, UsageError> {
    match value {
        None => Ok(default),
        Some("auto") => Ok(Switch::Auto),
        Some("on") => Ok(Switch::On),
        Some("off") => Ok(Switch::Off),
        Some(other) => Err(usage(format!("{option} is auto, on or off, not {other:?}"))),
    }
}

pub(super) fn parse_truncate(value: Option<&str>) -> Result<Truncate, UsageError> {
    match value {
        None | Some("refuse") => Ok(Truncate::Refuse),
        Some("zero") => Ok(Truncate::Zero),
        Some(other) => Err(usage(format!("--truncate is refuse or zero, not {other:?}"))),
    }
}

pub(super) fn parse_on_loss(value: Option<&str>) -> Result<OnLoss, UsageError> {
    match value {
        None | Some("wait") => Ok(OnLoss::Wait),
        Some("exit") => Ok(OnLoss::Exit),
        Some(other) => Err(usage(format!("--on-loss is wait or exit, not {other:?}"))),
    }
}

pub(super) fn parse_cache(value: Option<&str>) -> Result<CacheWish, UsageError> {
    match value {
        None | Some("auto") => Ok(CacheWish::Auto),
        Some("none") => Ok(CacheWish::Is(Cache::None)),
        Some("writethrough") => Ok(CacheWish::Is(Cache::Writethrough)),
        Some("writeback") => Ok(CacheWish::Is(Cache::Writeback)),
        Some(other) => {
            Err(usage(format!("--cache is auto, none, writethrough or writeback, not {other:?}")))
        }
    }
}

pub(super) fn parse_read_ahead(value: Option<&str>) -> Result<u64, UsageError> {
    let (default, most) = READ_AHEADS;
    let Some(value) = value else { return Ok(default) };
    parse_size(value).filter(|size| *size <= most).ok_or_else(|| {
        usage(format!("--read-ahead is a number of bytes from 0 to 1G, as 4M, not {value:?}"))
    })
}

pub(super) fn parse_connections(value: &str) -> Result<usize, UsageError> {
    value.parse().ok().filter(|n| CONNECTIONS.contains(n)).ok_or_else(|| {
        let (least, most) = CONNECTIONS.into_inner();
        usage(format!("--connections is a number from {least} to {most}, not {value:?}"))
    })
}

pub(super) fn parse_depth(value: &str) -> Result<usize, UsageError> {
    value.parse().ok().filter(|n| QUEUE_DEPTHS.contains(n)).ok_or_else(|| {
        let (least, most) = QUEUE_DEPTHS.into_inner();
        usage(format!("--queue-depth is a number from {least} to {most}, not {value:?}"))
    })
}

pub(super) fn parse_seconds(
    option: &str,
    value: Option<&str>,
    least: u64,
) -> Result<Option<Duration>, UsageError> {
    const MOST: u64 = 7 * 24 * 3600;
    let Some(value) = value else { return Ok(None) };
    let seconds = value.parse().ok().filter(|s| (least..=MOST).contains(s));
    seconds.map(|s| Some(Duration::from_secs(s))).ok_or_else(|| {
        usage(format!("--{option} is a number of seconds from {least} to {MOST}, not {value:?}"))
    })
}

pub(super) fn parse_unflushed(value: &str) -> Result<usize, UsageError> {
    let size = parse_size(value).and_then(|size| usize::try_from(size).ok());
    size.filter(|size| *size == 0 || UNFLUSHED.contains(size)).ok_or_else(|| {
        usage(format!("--unflushed is 0, or a number of bytes from 4M to 64G, not {value:?}"))
    })
}

pub(super) fn parse_path(what: &str, text: &str) -> Result<PathBuf, UsageError> {
    if text.is_empty() {
        return Err(usage(format!("{what} is empty: it is to be a path")));
    }
    Ok(PathBuf::from(text))
}

/// A source, and the same in the user's words.
pub(super) fn parse_shown_source(
    text: &str,
    server: Option<GivenServer>,
) -> Result<(Source, String), UsageError> {
    match server.filter(|_| text == SERVER) {
        Some(GivenServer { command, word }) => {
            let source = Source::Server(command);
            let words = word.unwrap_or_else(|| source.to_string());
            Ok((source, words))
        }
        None => Ok((parse_source(text)?, text.to_owned())),
    }
}

/// One that is no server of our own.
pub(super) fn parse_source(text: &str) -> Result<Source, UsageError> {
    if text.is_empty() {
        return Err(usage("SOURCE is empty: it is to be a path, an NBD URI or mem:SIZE"));
    }
    if let Some(size) = text.strip_prefix("mem:") {
        return Ok(Source::Memory(parse_size(size).ok_or_else(|| {
            usage(format!("mem:SIZE wants bytes, or a number with K, M, G or T, not {size:?}"))
        })?));
    }
    if Uri::is_nbd(text) {
        return text.parse().map(Source::Nbd).map_err(|e| usage(format!("{text}: {e}")));
    }
    // A path may have a colon and even "//" in it, but not in this way.
    if let Some((scheme, _)) = text.split_once("://") {
        return Err(usage(format!(
            "{scheme}:// is no scheme this version knows (for a file of that name: ./{text})"
        )));
    }
    Ok(Source::Path(PathBuf::from(text)))
}

/// A number of bytes: `4096`, `64K`, `1G`. At most what a file's offset can say.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "B" => 0,
        "K" | "k" | "KiB" => 10,
        "M" | "m" | "MiB" => 20,
        "G" | "g" | "GiB" => 30,
        "T" | "t" | "TiB" => 40,
        _ => return None,
    };
    let size = digits.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    (i64::try_from(size).is_ok() && digits.starts_with(|c: char| c.is_ascii_digit()))
        .then_some(size)
}
