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
    let done = act(words, as_helper);
    if let Err(failure) = &done {
        logging::say(log::Level::Error, &failure.to_string());
    }
    let status = match (done, as_helper) {
        (Err(Failure::Usage(_)), true) => mount_helper::USAGE,
        (Err(_) | Ok(1..), true) => mount_helper::FAILURE,
        (Err(failure), false) => failure.status(),
        (Ok(status), _) => status,
    };
    logging::finish();
    ExitCode::from(status)
}

/// The exit status; the program's own is that of the command of `--run`, say.
fn act(words: impl Iterator<Item = OsString>, as_helper: bool) -> Result<u8, Failure> {
    let command = understand(words, as_helper);
    logging::start();
    match command.map_err(Failure::Usage)? {
        Command::Print(text) => print(&text),
        Command::Info { source, words, json, remote } => {
            print(&look::info(&source, &words, json, &remote)?)
        }
        Command::List { uri, json, remote } => print(&look::list(&uri, json, &remote)?),
        Command::Mounts { json } => {
            let text = mounts::list(json);
            print(&text.map_err(|e| Failure::Serving(format!("the mounts cannot be listed: {e}")))?)
        }
        Command::Top { files, json } => top::run(&files, json).map(|()| 0),
        Command::Remount { mountpoint, read_only } => mount::remount(&mountpoint, read_only)
            .map(|()| 0)
            .map_err(|e| Failure::Mount(e.to_string())),
        Command::Serve(config) => serve(&config),
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

#[allow(unsafe_code)]
fn serve(config: &Config) -> Result<u8, Failure> {
    // Its own open files, what is mounted, and the program itself, as other processes of it.
    if !Path::new("/proc/self/fd").exists() {
        let why = "/proc is not there, which is needed (mount -t proc proc /proc)";
        return Err(Failure::Serving(why.into()));
    }
    if let Some(why) = pidfile_is_taken(config) {
        return Err(Failure::Serving(why));
    }
    // SAFETY: no thread was started yet, and what was opened is closed again.
    let split = || unsafe { daemon::split(config.paths()) };
    let split = config.daemonize.then(split).transpose();
    match split.map_err(|e| Failure::Serving(format!("no second process: {e}")))? {
        None => run::run(config, None),
        Some(Process::Background(background)) => run::run(config, Some(background)),
        Some(Process::Foreground(status)) => Ok(status),
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

fn print(text: &str) -> Result<u8, Failure> {
    let mut out = std::io::stdout();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // Who closes the pipe early does not want the rest.
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::Serving(format!("standard output: {e}")))
        }
        _ => Ok(0),
    }
}
