//! Tests `bench` on the embedded store.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;
use crate::screen::Screen;
use serde_json::Value;

#[test]
fn bench_measures_and_leaves_nothing() {
    let world = World::new();
    world.stanchion(["run", "k", "--", "true"]).finish().code(0);
    let out = world.stanchion(["bench", "--for", "50ms", "--tasks", "3", "--json"]).finish().code(0);
    assert_eq!(out.stderr, "", "no progress without a terminal");
    let record: Value = serde_json::from_str(&out.stdout).unwrap();
    assert_eq!(record["store"], format!("sqlite:{}", world.path("state/stanchion").display()));
    assert_eq!(record["for_ms"], 50);
    let measurements = record["measurements"].as_array().unwrap();
    let steps: Vec<_> =
        measurements.iter().map(|one| (one["tasks"].as_u64().unwrap(), one["step"].as_str().unwrap())).collect();
    let expected = [1, 3].map(|tasks| ["pair", "acquire", "release", "hand-off"].map(|step| (tasks, step)));
    assert_eq!(steps, expected.concat());
    let help = world.stanchion(["bench", "--help"]).finish().ok();
    for one in measurements {
        assert!(one["count"].as_u64().unwrap() > 0 && one["per_second"].as_f64().unwrap() > 0.0, "{one}");
        let (p50, p99) = (one["p50_us"].as_u64().unwrap(), one["p99_us"].as_u64().unwrap());
        assert!(0 < p50 && p50 <= p99, "{one}");
        for name in one.as_object().unwrap().keys() {
            assert!(help.contains(name.as_str()), "`{name}` is not in the help");
        }
    }
    assert_eq!(world.stanchion(["ls"]).finish().ok(), "");
    let table = world.stanchion(["bench", "--for", "10ms", "--tasks", "1"]).finish().ok();
    assert!(table.starts_with("store sqlite:/") && table.contains("\nTASKS  STEP      COUNT  "), "{table}");
    assert_eq!(table.lines().count(), 7, "{table}");
}

#[test]
fn bench_creates_no_store() {
    let world = World::new();
    world.stanchion(["bench", "--for", "10ms"]).finish().code(78).says(&["no store in `", "the first `stanchion run`"]);
    assert!(!world.path("state/stanchion").exists());
    world.stanchion(["bench", "--tasks", "0"]).finish().code(64).says(&["`0` is not a whole number from 1 to 1000"]);
}

#[test]
fn bench_shows_its_progress_on_a_terminal() {
    let world = World::new();
    world.stanchion(["run", "k", "--", "true"]).finish().code(0);
    let mut screen = Screen::new(&world, &["sh", "-c", "$S bench --for 100ms --tasks 2 > out; echo code $?"]);
    screen.shows("stanchion: measuring acquire and release, tasks: 1; ");
    screen.shows("stanchion: measuring hand-off, tasks: 2; ");
    screen.shows("\r\u{1b}[Kcode 0");
    screen.exit();
    assert!(world.read("out").contains("hand-off"));
}
