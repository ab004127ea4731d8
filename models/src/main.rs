//! Lists and checks the runs and mutants. `exhaust NAME` checks a mutant until its last state.
#![allow(clippy::print_stdout)]

use std::process::ExitCode;

use stanchion_models::mutant::Mutant;
use stanchion_models::run::{Report, run, run_mutant};
use stanchion_models::{mutant, runs};

fn show(report: &Report, with_traces: bool) {
    println!("{report}");
    for (name, trace) in report.broken.iter().filter(|_| with_traces) {
        println!("  {name}:");
        for action in trace {
            println!("    {action:?}");
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["list"] => {
            for config in runs::all().into_iter().chain(runs::long()) {
                println!("run    {:26} {}", config.name, config.description);
            }
            for mutant in mutant::all() {
                println!(
                    "mutant {:26} in {}: {}",
                    mutant.name,
                    mutant.config.name,
                    mutant.killed_by.unwrap_or("survives")
                );
            }
        }
        ["run", "all"] => runs::all().into_iter().for_each(|config| show(&run(config), false)),
        ["mutant", "all"] => mutant::all().into_iter().for_each(|mutant| show(&run_mutant(mutant), false)),
        ["run", name] => match runs::by_name(name) {
            Some(config) => show(&run(config), true),
            None => return ExitCode::FAILURE,
        },
        ["exhaust", name] => match mutant::by_mutant(name) {
            Some(mutant) => show(&run_mutant(Mutant { killed_by: None, ..mutant }), false),
            None => return ExitCode::FAILURE,
        },
        ["mutant", name] => match mutant::by_mutant(name) {
            Some(mutant) => show(&run_mutant(mutant), true),
            None => return ExitCode::FAILURE,
        },
        _ => {
            println!("usage: list | run NAME | run all | mutant NAME | mutant all | exhaust NAME");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
