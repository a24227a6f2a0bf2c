//! The terminal: taken for drawing, and given back as it was on every end, also by a panic.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, Once, PoisonError};

use rustix::termios::{
    Action, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcflow, tcgetattr,
    tcgetwinsize, tcsetattr,
};

/// The other screen, no cursor, and lines that are cut at the margin.
const ENTER: &str = "\x1b[?1049h\x1b[?25l\x1b[?7l";
const LEAVE: &str = "\x1b[?7h\x1b[?25h\x1b[?1049l";
/// Where a terminal does not know its size.
const USUAL: Size = Size { columns: 80, rows: 24 };

/// While the terminal is taken: the modes of its input before, if that is a terminal, too.
static BEFORE: Mutex<Option<Option<Termios>>> = Mutex::new(None);

/// In characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub columns: usize,
    pub rows: usize,
}

/// The terminal at standard output, and keys from standard input if that is one. When it is dropped
/// the terminal is as it was.
#[derive(Debug)]
pub struct Terminal(());

impl Terminal {
    /// Whether there is one that can be drawn on.
    pub fn is_there() -> bool {
        let kind = std::env::var("TERM").unwrap_or_default();
        io::stdout().is_terminal() && !["", "dumb"].contains(&kind.as_str())
    }

    /// Takes it.
    pub fn take() -> io::Result<Terminal> {
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            // What it says would vanish with the other screen.
            std::panic::set_hook(Box::new(move |info| {
                leave();
                before(info);
            }));
        });
        let terminal = Terminal(());
        terminal.enter()?;
        Ok(terminal)
    }

    /// As [`Terminal::take`], after [`leave`].
    pub fn enter(&self) -> io::Result<()> {
        let stdin = io::stdin();
        let modes = if stdin.is_terminal() { Some(tcgetattr(&stdin)?) } else { None };
        *lock() = Some(modes.clone());
        if let Some(mut modes) = modes {
            // Each key at once, and unseen; those that are signals stay so.
            modes.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
            modes.special_codes[SpecialCodeIndex::VMIN] = 1;
            modes.special_codes[SpecialCodeIndex::VTIME] = 0;
            tcsetattr(&stdin, OptionalActions::Now, &modes)?;
        }
        say(ENTER);
        Ok(())
    }

    /// Its size now.
    pub fn size(&self) -> Size {
        match tcgetwinsize(io::stdout()) {
            Ok(size) if size.ws_col > 0 && size.ws_row > 0 => {
                Size { columns: size.ws_col.into(), rows: size.ws_row.into() }
            }
            _ => USUAL,
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        leave();
    }
}

/// Gives it back, if it is taken.
pub fn leave() {
    let Some(modes) = lock().take() else { return };
    // Ctrl-S would keep this process from its end.
    let _ = tcflow(io::stdout(), Action::OOn);
    say(LEAVE);
    if let Some(modes) = modes {
        // It may be gone.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &modes);
    }
}

/// Past the buffer of standard output, which may be locked by whoever panics. It is short, and a
/// terminal that is gone needs none of it.
fn say(sequence: &str) {
    let _ = rustix::io::write(io::stdout(), sequence.as_bytes());
}

fn lock() -> std::sync::MutexGuard<'static, Option<Option<Termios>>> {
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner)
}
