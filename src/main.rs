//! The program: words → [`diskfuse::cli`] → [`diskfuse::run`] → exit status.

use std::io::Write;
use std::process::ExitCode;

use diskfuse::{cli, run};

/// Exit status for a command line that makes no sense.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format(|out, record| match record.level() {
            log::Level::Error | log::Level::Warn => writeln!(out, "diskfuse: {}", record.args()),
            level => {
                let level = level.as_str().to_lowercase();
                writeln!(out, "diskfuse: {} {level}: {}", out.timestamp_micros(), record.args())
            }
        })
        .init();
    let words: Result<Vec<String>, _> =
        std::env::args_os().skip(1).map(std::ffi::OsString::into_string).collect();
    let command = match words {
        Ok(words) => cli::parse(&words).map_err(|e| e.to_string()),
        Err(word) => Err(format!("{}: not UTF-8", word.display())),
    };
    match command {
        Ok(cli::Command::Print(text)) => {
            // Who closes the pipe early does not want the rest.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Ok(cli::Command::Serve(config)) => match run::run(&config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(failure) => {
                eprintln!("diskfuse: {failure}");
                ExitCode::from(failure.status())
            }
        },
        Err(why) => {
            eprintln!("diskfuse: {why}");
            ExitCode::from(USAGE)
        }
    }
}
