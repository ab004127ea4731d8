//! Checks that the rules of holds that linger hold in every run, and that each mutant breaks its property.
#![allow(clippy::print_stdout)]

use std::collections::BTreeSet;

use stanchion_models::linger::config::Config;
use stanchion_models::linger::{mutant, properties, runs};
use stanchion_models::run::{run, run_mutant};

/// Checks the runs. Returns the events that they reached.
fn check(chosen: impl Fn(&Config) -> bool) -> BTreeSet<&'static str> {
    let mut reached = BTreeSet::new();
    for config in runs::all().into_iter().filter(chosen) {
        let report = run(config);
        println!("{report}");
        assert!(report.broken.is_empty(), "{report}");
        assert!(report.complete, "{} did not visit all its states", config.name);
        assert!(report.states >= config.min_states, "{} visited only {} states", config.name, report.states);
        reached.extend(report.reached);
    }
    reached
}

fn assert_reached(reached: &BTreeSet<&str>, but: &[&str]) {
    let names = properties::all().into_iter().map(|property| property.name).filter(|name| name.contains(' '));
    for name in names.filter(|name| !but.contains(name)) {
        assert!(reached.contains(name), "no run reached: {name}");
    }
}

fn check_mutants(chosen: impl Fn(&Config) -> bool) {
    for mutant in mutant::all().into_iter().filter(|mutant| chosen(&mutant.config)) {
        let report = run_mutant(mutant);
        println!("{report}");
        match mutant.killed_by {
            Some(property) => assert!(report.trace(property).is_some(), "{} survived {property}", mutant.name),
            None => assert!(report.complete, "{} was expected to survive but did not complete", mutant.name),
        }
    }
}

#[test]
fn lingering_holds_in_every_short_run() {
    let reached = check(Config::is_short);
    // Only long runs have a force-release together with a failover or with plain calls.
    assert_reached(&reached, &["a failover that undid a force-release", "a plain guard while a hold is kept"]);
}

#[test]
#[ignore = "long"]
fn lingering_holds_in_every_run() {
    assert_reached(&check(|_| true), &[]);
}

#[test]
fn each_mutant_breaks_its_property() {
    check_mutants(|config| !config.failover);
}

#[test]
#[ignore = "long"]
fn each_failover_mutant_breaks_its_property() {
    check_mutants(|config| config.failover);
}

#[test]
fn run_and_mutant_names_are_unique() {
    let mut names: Vec<&str> = runs::all().iter().chain(&runs::long()).map(|config| config.name).collect();
    names.extend(mutant::all().iter().map(|mutant| mutant.name));
    names.extend(stanchion_models::runs::all().iter().chain(&stanchion_models::runs::long()).map(|config| config.name));
    names.extend(stanchion_models::mutant::all().iter().map(|mutant| mutant.name));
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
}
