//! The program: words → [`cli`] → [`run`] → exit status.

use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::ExitCode;

use diskfuse::mount::{self, errands};
use diskfuse::program::cli::{self, Command, Config, Source};
use diskfuse::program::daemon::{self, Process};
use diskfuse::program::failure::Failure;
use diskfuse::program::{ask, logging, look, mount_helper, mounts, own_folder, run, server, top};

/// Exit status for a command line that makes no sense.
const USAGE: u8 = 2;
/// For a mount that cannot be changed.
const MOUNT: u8 = 4;

fn main() -> ExitCode {
    let called = errands::run_if_called()
        .or_else(own_folder::run_if_called)
        .or_else(server::become_if_called)
        .or_else(ask::run_if_called);
    if let Some(status) = called {
        return status;
    }
    let mut words = std::env::args_os();
    let as_helper = words.next().is_some_and(|name| mount_helper::is_called(&name));
    let status = match (act(words, as_helper), as_helper) {
        (USAGE, true) => mount_helper::USAGE,
        (1.., true) => mount_helper::FAILURE,
        (status, _) => status,
    };
    logging::finish();
    ExitCode::from(status)
}

fn act(words: impl Iterator<Item = OsString>, as_helper: bool) -> u8 {
    let command = understand(words, as_helper);
    logging::start();
    match command {
        Ok(Command::Print(text)) => print(&text),
        Ok(Command::Info { source, words, json, remote }) => {
            answer(look::info(&source, &words, json, &remote))
        }
        Ok(Command::List { uri, json, remote }) => answer(look::list(&uri, json, &remote)),
        Ok(Command::Mounts { json }) => match mounts::list(json) {
            Ok(text) => print(&text),
            Err(e) => fail(&format!("the mounts cannot be listed: {e}"), 1),
        },
        Ok(Command::Top { files, json }) => match top::run(&files, json) {
            Ok(()) => 0,
            Err(failure) => fail(&failure.to_string(), failure.status()),
        },
        Ok(Command::Remount { mountpoint, read_only }) => {
            match mount::remount(&mountpoint, read_only) {
                Ok(()) => 0,
                Err(e) => fail(&e.to_string(), MOUNT),
            }
        }
        Ok(Command::Serve(config)) => serve(&config),
        Err(why) => fail(&why, USAGE),
    }
}

fn understand(words: impl Iterator<Item = OsString>, as_helper: bool) -> Result<Command, String> {
    let words = words.map(|word| {
        let not_utf8 =
            |word: OsString| format!("{}: not UTF-8: use a symbolic link that is", word.display());
        word.into_string().map_err(not_utf8)
    });
    let words: Vec<String> = words.collect::<Result<_, _>>()?;
    if !as_helper {
        let mut command = cli::parse(&words).map_err(|e| e.to_string())?;
        if let Command::Serve(config) = &mut command
            && config.run.is_none()
        {
            config.daemonize |= mount_helper::is_called_by_mount_fuse(&words);
        }
        return Ok(command);
    }
    let call = mount_helper::parse(&words)?;
    let command = cli::parse_as(&call.words, call.is_sloppy).map_err(|e| e.to_string())?;
    if let Some(namespace) = &call.namespace {
        let entered = mount::enter(namespace);
        entered.map_err(|e| format!("{}: no such namespace: {e}", namespace.display()))?;
    }
    match command {
        Command::Serve(_) | Command::Remount { .. } if call.is_fake => {
            Ok(Command::Print(String::new()))
        }
        command => Ok(command),
    }
}

fn answer(result: Result<String, Failure>) -> u8 {
    match result {
        Ok(text) => print(&text),
        Err(failure) => fail(&failure.to_string(), failure.status()),
    }
}

#[allow(unsafe_code)]
fn serve(config: &Config) -> u8 {
    if let Some(why) = pidfile_is_taken(config) {
        return fail(&why, 1);
    }
    // SAFETY: no thread was started yet, and what was opened is closed again.
    let split = || unsafe { daemon::split(config.paths()) };
    let background = match config.daemonize.then(split).transpose() {
        Ok(None) => None,
        Ok(Some(Process::Background(background))) => Some(background),
        Ok(Some(Process::Foreground(status))) => return status,
        Err(e) => return fail(&format!("no second process: {e}"), 1),
    };
    match run::run(config, background) {
        Ok(status) => status,
        Err(failure) => fail(&failure.to_string(), failure.status()),
    }
}

/// A pidfile is emptied, and removed at the end: it can be nothing else. An empty image would pass
/// for one.
fn pidfile_is_taken(config: &Config) -> Option<String> {
    let pidfile = config.pidfile.as_deref()?;
    let is = |path: Option<&Path>| path.is_some_and(|path| daemon::is_same_file(pidfile, path));
    let source = match &config.source {
        Source::Path(path) => Some(path.as_path()),
        Source::Nbd(_) | Source::Memory(_) | Source::Server(_) => None,
    };
    let uses = [("SOURCE", source), ("MOUNTPOINT", config.mountpoint.as_deref())];
    let (what, _) = uses.into_iter().find(|(_, path)| is(*path))?;
    let pidfile = pidfile.display();
    Some(format!("{pidfile}: is not a pidfile but {what}: choose a path where nothing is"))
}

fn fail(why: &str, status: u8) -> u8 {
    logging::say(log::Level::Error, why);
    status
}

fn print(text: &str) -> u8 {
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Who closes the pipe early does not want the rest.
        Err(e) if e.kind() != ErrorKind::BrokenPipe => fail(&format!("standard output: {e}"), 1),
        _ => 0,
    }
}
