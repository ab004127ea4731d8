//! Takes the terminal over, and gives it back whatever happens: at the end, after a panic, at a signal.

use std::io::{self, stdout};
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{Event, KeyEvent, KeyEventKind, poll, read};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{Clear, ClearType, EnterAlternateScreen, enable_raw_mode};
use ratatui::{DefaultTerminal, Frame, Terminal};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP};

use crate::exit_code;
use crate::message::Failure;
use crate::sys;

/// Time after which the view is drawn again without a key, with the news that have arrived.
const TICK: Duration = Duration::from_millis(200);

/// The terminal while it shows the view.
#[derive(Debug)]
pub(super) struct Screen {
    /// Never dropped: its drop writes to the terminal once more, and panics if the terminal has gone.
    terminal: ManuallyDrop<DefaultTerminal>,
    /// The last signal, or zero.
    signal: Arc<AtomicUsize>,
}

/// An input from the terminal or from another process within a tick.
#[derive(Debug)]
pub(super) enum Input {
    None,
    Key(KeyEvent),
    Signal(i32),
}

impl Screen {
    /// Takes the terminal over. Returns `None` if the terminal has gone.
    pub(super) fn enter() -> Result<Option<Self>, Failure> {
        let signal = Arc::new(AtomicUsize::new(0));
        for number in [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP] {
            if !sys::is_ignored(number) {
                let value = usize::try_from(number).unwrap_or_default();
                signal_hook::flag::register_usize(number, signal.clone(), value).map_err(failed)?;
            }
        }
        // This also sets a panic hook that gives the terminal back before it reports the panic.
        match ratatui::try_init() {
            Ok(terminal) => Ok(Some(Self { terminal: ManuallyDrop::new(terminal), signal })),
            Err(error) => {
                let _ = ratatui::try_restore(); // the terminal may be gone
                if is_gone(&error) { Ok(None) } else { Err(failed(error)) }
            }
        }
    }

    pub(super) fn draw(&mut self, view: impl FnOnce(&mut Frame<'_>)) -> Result<(), Failure> {
        match self.terminal.draw(view) {
            // The next input says that the terminal has gone.
            Err(error) if !is_gone(&error) => Err(failed(error)),
            _ => Ok(()),
        }
    }

    /// Waits for a key or a signal, for a tick at most.
    pub(super) fn input(&mut self) -> Result<Input, Failure> {
        if !self.wait_for_input()? {
            return Ok(Input::Signal(SIGHUP));
        }
        let arrived = poll(Duration::ZERO).and_then(|is_ready| if is_ready { read().map(Some) } else { Ok(None) });
        let key = match arrived {
            Ok(Some(Event::Key(key))) if key.kind != KeyEventKind::Release => Some(key),
            Ok(_) => None,
            // The signal ended the wait.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(error) if is_gone(&error) => return Ok(Input::Signal(SIGHUP)),
            Err(error) if self.signal.load(Ordering::Relaxed) == 0 => return Err(failed(error)),
            Err(_) => None,
        };
        match i32::try_from(self.signal.swap(0, Ordering::Relaxed)).unwrap_or_default() {
            0 => Ok(key.map_or(Input::None, Input::Key)),
            SIGTSTP => self.suspend().map(|()| Input::None),
            signal => Ok(Input::Signal(signal)),
        }
    }

    /// Waits until the terminal has input or a signal comes, for a tick at most. Returns whether the terminal is still there:
    /// crossterm would read from one that has gone for ever, and no signal would end that.
    fn wait_for_input(&self) -> Result<bool, Failure> {
        let stdin = io::stdin();
        let mut terminal = [PollFd::new(&stdin, PollFlags::IN)];
        let tick = Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos().into() };
        match rustix::event::poll(&mut terminal, Some(&tick)) {
            Ok(_) => Ok(!terminal[0].revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL)),
            // A signal ended the wait.
            Err(Errno::INTR) => Ok(true),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Gives the terminal back, stops this process, and takes the terminal over again when the process goes on.
    pub(super) fn suspend(&mut self) -> Result<(), Failure> {
        self.leave();
        signal_hook::low_level::emulate_default_handler(SIGTSTP).map_err(failed)?;
        enable_raw_mode().map_err(failed)?;
        execute!(stdout(), EnterAlternateScreen, Clear(ClearType::All)).map_err(failed)?;
        // A new one draws everything. To clear the old one would wait for the terminal to report where the cursor is.
        self.terminal = ManuallyDrop::new(Terminal::new(CrosstermBackend::new(stdout())).map_err(failed)?);
        Ok(())
    }

    fn leave(&mut self) {
        let _ = self.terminal.show_cursor(); // the terminal may be gone
        let _ = ratatui::try_restore(); // as above
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // After a panic the hook has left already, and printed the panic, which leaving again would hide.
        if !std::thread::panicking() {
            self.leave();
        }
    }
}

/// Returns whether an error says that the terminal was closed. The signal of that may come a moment later than the error.
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::IO.raw_os_error())
}

fn failed(error: io::Error) -> Failure {
    Failure::new(exit_code::INTERNAL, format!("the terminal cannot be used: {error}"))
}
