//! What is shown on a terminal beside the log.

use std::os::unix::net::UnixListener;

use libtest_mimic::Trial;

use crate::common::export::binary;
use crate::common::sandbox::Sandbox;
use crate::common::suite::trial;
use crate::common::{program, succeed};

pub fn trials() -> Vec<Trial> {
    vec![
        trial("terminal/wait_is_shown_beside_the_log".into(), vec!["nbd", "python3"], is_shown),
        trial("terminal/background_shows_nothing".into(), vec!["nbd", "python3"], is_not_shown),
    ]
}

/// What a terminal gets of a diskfuse that connects to a server that says nothing. It is asked for
/// its counters in between, and ended by the terminal's Ctrl-C.
fn shown(in_foreground: bool) -> String {
    const TERMINAL: &str = r#"
import fcntl, os, pty, select, signal, struct, sys, termios, time
mode, *command = sys.argv[1:]
child, terminal = pty.fork()
if child == 0:
    fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    os.environ.update(TERM="xterm", RUST_LOG="error")
    if mode == "background":
        server = os.fork()
        if server:
            # The shell, which has the terminal.
            signal.signal(signal.SIGINT, lambda *_: os.kill(server, signal.SIGINT))
            signal.signal(signal.SIGUSR1, lambda *_: os.kill(server, signal.SIGUSR1))
            os._exit(os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]))
        os.setpgid(0, 0)
    os.execv(command[0], command)
seen = b""
def read(what, seconds):
    global seen
    end = time.monotonic() + seconds
    while what not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 0.05)[0]:
            try:
                seen += os.read(terminal, 4096)
            except OSError:
                break
read(b" s)", 60 if mode == "foreground" else 3)
os.kill(child, signal.SIGUSR1)
read(b"yet", 60)
# Below the new line, too.
if mode == "foreground":
    shown = seen.count(b" s)")
    while seen.count(b" s)") == shown:
        read(b"\0", 0.1)
os.write(terminal, b"\x03") if mode == "foreground" else os.kill(child, signal.SIGINT)
read(b"stopped by signal", 60)
read(b"\0", 0.3)
sys.stdout.buffer.write(seen)
"#;
    let sandbox = Sandbox::new();
    let socket = sandbox.join("a-socket-whose-name-is-longer-than-the-terminal-is-wide");
    let _server = UnixListener::bind(&socket).unwrap();
    let mode = if in_foreground { "foreground" } else { "background" };
    let mut python = program("python3", ["-c", TERMINAL, mode, binary(), "--connect-timeout=100"]);
    python.arg(format!("nbd+unix:///?socket={}", socket.display())).arg(sandbox.join("disk"));
    succeed(&mut python)
}

/// What is on the screen: a line that is erased is not.
fn screen(shown: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for part in shown.replace("\r\n", "\n").split_inclusive(['\n', '\r']) {
        let part = part.strip_prefix("\x1b[K").unwrap_or(part);
        match (part.strip_suffix('\n'), part.strip_suffix('\r')) {
            (Some(line), _) => {
                lines.last_mut().unwrap().push_str(line);
                lines.push(String::new());
            }
            (_, Some(_)) => *lines.last_mut().unwrap() = String::new(),
            _ => lines.last_mut().unwrap().push_str(part),
        }
    }
    lines
}

fn is_shown() {
    let shown = shown(true);
    let drawn: Vec<_> = shown.split("\r\x1b[K").skip(1).collect();
    let line = drawn.iter().find(|line| line.contains(" s)")).unwrap_or_else(|| panic!("{shown}"));
    assert!(line.starts_with("diskfuse: connecting to nbd+unix:"), "{line:?}");
    assert!(line.ends_with("... (2 s)") && line.len() == 59, "{line:?}");
    // Twice at least: it goes on below the answer to SIGUSR1.
    assert!(drawn.iter().filter(|line| line.contains(" s)")).count() >= 2, "{shown:?}");
    let screen = screen(&shown);
    assert!(screen.iter().all(|line| !line.contains("connecting to")), "{screen:?}");
    for words in ["nothing is served yet", "stopped by signal 2"] {
        assert_eq!(screen.iter().filter(|line| line.contains(words)).count(), 1, "{screen:?}");
    }
}

/// Where the shell has the terminal, its line is what the user types.
fn is_not_shown() {
    let shown = shown(false);
    assert!(!shown.contains('\x1b') && !shown.contains("connecting to"), "{shown:?}");
    assert!(shown.contains("nothing is served yet") && shown.contains("stopped by signal 2"));
}
