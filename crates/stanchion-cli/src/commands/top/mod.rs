//! `top`: a full-screen view of the keys, in which a hold can be force-released.

mod looker;
mod screen;
mod state;
mod view;

use std::io::IsTerminal as _;

use stanchion::Clock;

use self::looker::Looker;
use self::screen::{Input, Screen};
use self::state::{Action, State};
use crate::arguments::Top;
use crate::exit_code;
use crate::message::Failure;
use crate::store::StoreChoice;

/// The reason why the view ends.
enum End {
    Quit,
    Signal(i32),
}

pub(super) fn execute(top: &Top, store: &StoreChoice) -> Result<u8, Failure> {
    if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        let message = "`top` needs a terminal: `ls` prints the keys once, and `watch` prints changes";
        return Err(Failure::new(exit_code::USAGE, message));
    }
    store.check_exists()?;
    let looker = Looker::start(store.clone(), top.prefix.clone())?;
    // The screen is left before anything else is printed.
    let ended = Screen::enter().and_then(|screen| match screen {
        Some(mut screen) => show(&mut screen, State::new(store.shown()), &looker),
        None => Ok(End::Signal(signal_hook::consts::SIGHUP)),
    });
    looker.stop();
    match ended? {
        End::Quit => Ok(exit_code::OK),
        End::Signal(signal) => {
            let _ = signal_hook::low_level::emulate_default_handler(signal); // the first process of a container stays alive
            Ok(exit_code::of_signal(signal))
        }
    }
}

/// Shows the keys until the user or a signal ends that.
fn show(screen: &mut Screen, mut state: State, looker: &Looker) -> Result<End, Failure> {
    let clock = Clock::system();
    loop {
        for message in looker.messages()? {
            state.learn(message, clock.now());
        }
        screen.draw(|frame| view::draw(frame, &state, clock.now()))?;
        match screen.input()? {
            Input::None => {}
            Input::Signal(signal) => return Ok(End::Signal(signal)),
            Input::Key(key) => match state.press(key) {
                None => {}
                Some(Action::Quit) => return Ok(End::Quit),
                Some(Action::Suspend) => screen.suspend()?,
                Some(Action::ForceRelease(order)) => looker.force_release(order),
            },
        }
    }
}
