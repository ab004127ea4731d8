//! Checks that the protocol holds in every run, and that each mutant breaks its property.
#![allow(clippy::print_stdout)]

use std::collections::BTreeSet;

use stanchion_models::config::Config;
use stanchion_models::run::{Report, run, run_mutant};
use stanchion_models::{mutant, properties, runs};

fn holds(config: Config) -> Report {
    let report = run(config);
    println!("{report}");
    assert!(report.broken.is_empty(), "{report}");
    assert!(report.complete, "{} did not visit all its states", config.name);
    assert!(report.states >= config.min_states, "{} visited only {} states", config.name, report.states);
    report
}

#[test]
fn protocol_holds_in_every_run() {
    let reached: BTreeSet<&str> = runs::all().into_iter().flat_map(|config| holds(config).reached).collect();
    for name in properties::all().iter().map(|property| property.name).filter(|name| name.contains(' ')) {
        assert!(reached.contains(name), "no run reached: {name}");
    }
}

#[test]
fn each_mutant_breaks_its_property() {
    for mutant in mutant::all() {
        let report = run_mutant(mutant);
        println!("{report}");
        match mutant.killed_by {
            Some(property) => assert!(report.trace(property).is_some(), "{} survived {property}", mutant.name),
            None => assert!(report.complete, "{} was expected to survive but did not complete", mutant.name),
        }
    }
}

#[test]
fn run_and_mutant_names_are_unique() {
    let mut names: Vec<&str> = runs::all().iter().chain(&runs::long()).map(|config| config.name).collect();
    names.extend(mutant::all().iter().map(|mutant| mutant.name));
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
}
