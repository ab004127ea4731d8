//! Lists and checks the runs and mutants. `exhaust NAME` checks a mutant until its last state. `run NAME SECONDS` cuts the
//! search after that time.
#![allow(clippy::print_stdout)]

use std::process::ExitCode;
use std::time::Duration;

use stanchion_models::mutant::Mutant;
use stanchion_models::run::{Bounds, Report, run, run_for, run_mutant};
use stanchion_models::{linger, mutant, runs};

fn show(report: &Report, with_traces: bool) {
    println!("{report}");
    for (name, trace) in report.broken.iter().filter(|_| with_traces) {
        println!("  {name}:");
        for action in trace {
            println!("    {action}");
        }
    }
    if with_traces && !report.reached.is_empty() {
        println!("  reached: {}", report.reached.join(", "));
    }
}

/// The runs and mutants of one model.
struct Family<B> {
    runs: Vec<B>,
    long: Vec<B>,
    mutants: Vec<Mutant<B>>,
}

impl<B: Bounds> Family<B> {
    fn list(&self) {
        for run in self.runs.iter().chain(&self.long) {
            println!("run    {:26} {}", run.name(), run.description());
        }
        for mutant in &self.mutants {
            let killed_by = mutant.killed_by.unwrap_or("survives");
            println!("mutant {:26} in {}: {killed_by}", mutant.name, mutant.config.name());
        }
    }

    fn run_all(&self) {
        self.runs.iter().for_each(|bounds| show(&run(*bounds), false));
    }

    fn mutant_all(&self) {
        self.mutants.iter().for_each(|mutant| show(&run_mutant(*mutant), false));
    }

    /// Checks the run with this name. Returns whether there is one.
    fn run(&self, name: &str, time: Option<Duration>) -> bool {
        let found = self.runs.iter().chain(&self.long).find(|run| run.name() == name);
        found.map(|bounds| show(&run_for(*bounds, time), true)).is_some()
    }

    /// Checks the mutant with this name. Returns whether there is one.
    fn mutant(&self, name: &str, exhausts: bool) -> bool {
        let Some(mutant) = self.mutants.iter().find(|mutant| mutant.name == name) else { return false };
        match exhausts {
            true => show(&run_mutant(Mutant { killed_by: None, ..*mutant }), false),
            false => show(&run_mutant(*mutant), true),
        }
        true
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let protocol = Family { runs: runs::all(), long: runs::long(), mutants: mutant::all() };
    let lingering = Family { runs: linger::runs::all(), long: linger::runs::long(), mutants: linger::mutant::all() };
    let is_found = match arguments.as_slice() {
        ["list"] => {
            protocol.list();
            lingering.list();
            true
        }
        ["run", "all"] => {
            protocol.run_all();
            lingering.run_all();
            true
        }
        ["mutant", "all"] => {
            protocol.mutant_all();
            lingering.mutant_all();
            true
        }
        ["run", name] => protocol.run(name, None) || lingering.run(name, None),
        ["run", name, seconds] => {
            let time = seconds.parse().ok().map(Duration::from_secs);
            time.is_some() && (protocol.run(name, time) || lingering.run(name, time))
        }
        ["exhaust", name] => protocol.mutant(name, true) || lingering.mutant(name, true),
        ["mutant", name] => protocol.mutant(name, false) || lingering.mutant(name, false),
        _ => {
            println!("usage: list | run NAME [SECONDS] | run all | mutant NAME | mutant all | exhaust NAME");
            false
        }
    };
    if is_found { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
