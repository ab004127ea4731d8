//! Runs the model by hand.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
use stanchion_models::{config, model::Protocol};
use stateright::{Checker, Model};

fn main() {
    let name = std::env::args().nth(1).unwrap_or("base".into());
    let config = config::by_name(&name).unwrap();
    let checker = Protocol { config, broken: None }.checker().threads(2).spawn_bfs().join();
    println!("{} unique {} done {}", name, checker.unique_state_count(), checker.is_done());
    for (name, path) in checker.discoveries() {
        println!("{name}:");
        for action in path.into_actions() {
            println!("  {action:?}");
        }
    }
}
