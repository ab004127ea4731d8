//! Runs the model by hand.
#![allow(clippy::unwrap_used, clippy::print_stdout)]
use stanchion_models::{config, model::Protocol};
use stateright::{Checker, Model};
use std::time::Duration;

fn main() {
    let only = std::env::args().nth(1).unwrap_or("all".into());
    for config in config::all() {
        if only != "all" && !only.split(',').any(|n| n == config.name) { continue; }
        let t = std::time::Instant::now();
        let checker = Protocol { config, broken: None }.checker().threads(2).timeout(Duration::from_secs(15)).spawn_bfs().join();
        println!("{} unique {} {:.1?} depth {}", config.name, checker.unique_state_count(), t.elapsed(), checker.max_depth());
        for (name, path) in checker.discoveries() {
            let actions = path.into_actions();
            println!("{name}: {}", actions.len());
            if only != "all" { for action in actions { println!("  {action:?}"); } }
        }
    }
}
