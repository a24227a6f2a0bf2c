//! `--info` and `--list`: looks at a source or a server, and closes it again.

use std::time::Duration;

use super::cli::Source;
use super::failure::{Failure, local_failure, no_thread, path_failure, remote_failure};
use super::hints;
use super::info::{self, Listing, LocalInfo, RemoteInfo};
use super::server::Server;
use crate::backend::Backend;
use crate::backend::file::FileBackend;
use crate::backend::nbd::info::ExportInfo;
use crate::backend::nbd::{self, NbdBackend, Uri};
use crate::io::start_reactor;
use crate::partitions::Table;

/// What a source is, as text or JSON.
pub fn info(
    source: &Source,
    words: &str,
    json: bool,
    remote: &nbd::Options,
) -> Result<String, Failure> {
    start_reactor().map_err(no_thread)?;
    let remote_info = |uri: &Uri, export| {
        let partition_table = remote_table(uri, words, &export, remote);
        let source = words.into();
        info::text(&RemoteInfo { source, kind: "nbd", export, partition_table }, json)
    };
    let text = match source {
        Source::Nbd(uri) => {
            let export = nbd::info::info(uri, remote);
            remote_info(uri, export.map_err(|e| remote_failure(uri, &e))?)
        }
        Source::Server(command) => {
            let server = Server::start(command, words.into());
            let mut server = server.map_err(Failure::Source)?;
            server.show_words().map_err(no_thread)?;
            let export = nbd::info::info(&server.uri(), remote);
            let export = export.map_err(|e| Failure::Source(server.failure(&e)))?;
            remote_info(&server.uri(), export)
        }
        Source::Path(path) => {
            let info = LocalInfo::look_at(path).map_err(|e| path_failure(path, &e))?;
            if let Some(warning) = hints::other_format(path) {
                log::warn!("{warning}");
            }
            info::text(&info, json)
        }
        Source::Memory(size) => {
            let backend = FileBackend::memory(*size, false).map_err(local_failure)?;
            let info = LocalInfo::of(words.into(), &backend);
            let info = info.map_err(|e| Failure::Source(format!("{words}: {e}")))?;
            info::text(&info, json)
        }
    };
    text.map_err(|e| Failure::Source(format!("{words}: {e}")))
}

/// The partition table of an export, for which that has to be opened.
fn remote_table(
    uri: &Uri,
    words: &str,
    export: &ExportInfo,
    remote: &nbd::Options,
) -> Option<Table> {
    if export.size == 0 {
        return None;
    }
    let opened = NbdBackend::connect(uri, remote);
    let opened = opened.inspect_err(|e| log::warn!("{words}: its partition table: {e}")).ok()?;
    let table = info::partition_table(words, &*opened);
    // Nothing was written, so that this only disconnects.
    let _ = opened.last_flush(Duration::ZERO);
    table
}

/// What a server has, as text or JSON.
pub fn list(uri: &Uri, json: bool, remote: &nbd::Options) -> Result<String, Failure> {
    start_reactor().map_err(no_thread)?;
    let exports = nbd::info::list(uri, remote);
    let exports = exports.map_err(|e| remote_failure(uri, &e))?;
    info::text(&Listing { exports }, json).map_err(|e| Failure::Source(format!("{uri}: {e}")))
}
