//! A source that is lost while it is served: the log is told of it, and the export is ended for it
//! if that is wished.

use super::control::Control;
use super::stop::Stop;
use crate::backend::{Backend, Failure};
use crate::export::Export;
use crate::program::cli::OnLoss;
use crate::sys;

impl Control {
    /// Looks how it stands with the source, and acts on what is new.
    pub(super) fn follow_source<B: Backend>(&mut self, export: &Export<B>) {
        let backend = export.backend();
        let outage = backend.outage();
        let mut failure = outage.as_ref().and_then(|outage| outage.failure.clone());
        if let Some(server) = &mut self.server {
            // Where its connection has ended it has, too, in a moment, and that says more.
            let is_news = failure.is_some() && !self.failure_is_told;
            if let Some(death) = if is_news { server.death_soon() } else { server.death() } {
                backend.hurry();
                failure = Some(death);
            }
        }
        match failure {
            None => self.failure_is_told = false,
            Some(_) if std::mem::replace(&mut self.failure_is_told, true) => {}
            Some(failure) if self.on_loss == OnLoss::Exit && self.stop.is_none() => {
                backend.hurry();
                self.end_for(&failure);
            }
            Some(Failure { what, why, for_good }) => {
                let until = if for_good { "from now on" } else { "until the server is back" };
                log::error!("{}: {what}, requests fail {until}: {why}", self.source);
            }
        }
    }

    /// As at a signal: the command of `--run` is asked to end, or the file is taken away.
    fn end_for(&mut self, Failure { what, why, .. }: &Failure) {
        self.lost =
            Some(format!("{}: {what}, and it ends for that (--on-loss exit): {why}", self.source));
        match &self.command {
            Some(command) => {
                if let Err(e) = sys::kill(command.id(), libc::SIGTERM) {
                    log::warn!("the command cannot be signalled: {e}");
                }
            }
            None => self.stop = Some(Stop::now(&self.closed)),
        }
    }
}
