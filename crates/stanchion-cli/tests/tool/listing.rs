//! Tests `ls`, `inspect` and `watch`.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::io::{BufRead as _, BufReader};

use crate::common::*;
use rustix::process::Signal;
use serde_json::Value;

/// A holder with metadata that would like to steer a terminal, a waiter behind it, and a closed key.
fn scene(world: &World) -> [Running; 2] {
    world.stanchion(["run", "closed", "--cooldown", "1h", "--", "true"]).finish().code(0).silent();
    let metadata = "a\u{1b}[2Jb\nc";
    let holder = ["run", "job 1", "--metadata", metadata, "-c", "touch $D/held; exec sleep 600"];
    let holder = world.stanchion(holder).start();
    world.until_file("held");
    let waiter = world.stanchion(["run", "job 1", "--", "true"]).start();
    world.until_waiting("job 1", 1);
    [holder, waiter]
}

#[test]
fn json_has_the_documented_fields() {
    let world = World::new();
    let [holder, waiter] = scene(&world);
    let text = world.stanchion(["ls", "--json"]).finish().ok();
    let keys: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(keys.len(), 2);
    let (closed, job) = (&keys[0], &keys[1]);
    assert_eq!(closed["key"], "closed");
    assert_eq!(
        (&closed["capacity"], &closed["holders"], &closed["waiters"]),
        (&Value::Null, &Value::from([0; 0]), &Value::from([0; 0]))
    );
    assert!((3_500_000..=3_600_000).contains(&closed["closed_for_ms"].as_u64().unwrap()));
    assert_eq!((&job["key"], &job["capacity"], &job["closed_for_ms"]), (&"job 1".into(), &1.into(), &Value::Null));
    let hold = &job["holders"][0];
    assert_eq!(hold["fence"], job["last_fence"]);
    assert!(hold["fence"].as_u64().unwrap() < 1 << 53);
    assert!(hold["owner"].as_str().unwrap().ends_with(&format!("/{}", holder.pid())), "{hold}");
    assert_eq!(
        (&hold["units"], &hold["session_bound"], &hold["remaining_ms"]),
        (&1.into(), &true.into(), &Value::Null)
    );
    assert!(hold["age_ms"].is_u64());
    assert!(humantime::parse_rfc3339(hold["since"].as_str().unwrap()).is_ok());
    assert_eq!((&hold["metadata"], &hold["trace"]), (&"a\u{1b}[2Jb\nc".into(), &Value::Null));
    let waits = &job["waiters"][0];
    assert!(waits["owner"].as_str().unwrap().ends_with(&format!("/{}", waiter.pid())), "{waits}");
    assert_eq!((&waits["units"], &waits["metadata"]), (&1.into(), &Value::Null));
    assert!(waits["age_ms"].is_u64());

    let one: Value = serde_json::from_str(&world.stanchion(["inspect", "job 1", "--json"]).finish().ok()).unwrap();
    let names = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let without_the_run: Vec<_> = names(&one).into_iter().filter(|name| name != "last_run").collect();
    assert_eq!(without_the_run, names(job));
    let help = world.stanchion(["ls", "--help"]).finish().ok();
    for name in names(job).iter().chain(&names(hold)).chain(&names(waits)) {
        assert!(help.contains(name.as_str()), "`{name}` is not in the help");
    }
}

#[test]
fn tables_are_aligned_and_harmless() {
    let world = World::new();
    let _scene = scene(&world);
    let text = world.stanchion(["ls"]).finish().ok();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    let column = lines[0].find("FENCE").unwrap();
    assert!(lines[0].ends_with("METADATA        FENCE"), "{text}");
    assert!(
        lines[1].starts_with("closed  closed         ") && lines[2].starts_with("job 1   held    alone  "),
        "{text}"
    );
    assert!(lines[1..].iter().all(|line| line[column..].parse::<u64>().is_ok()), "{text}");
    assert!(lines[2].contains(r"a\u{1b}[2Jb\nc  "), "{text}");
    let text = world.stanchion(["inspect", "job 1"]).finish().ok();
    for part in ["state    held", "holder   sh@", "waiter 1 true@", r"metadata: a\u{1b}[2Jb\nc"] {
        assert!(text.contains(part), "no `{part}` in {text}");
    }
    assert_eq!(world.stanchion(["inspect", "other"]).finish().ok(), "key      other\nstate    free\n");
    assert_eq!(world.stanchion(["ls", "nothing"]).finish().ok(), "");
    assert_eq!(world.stanchion(["ls", "job"]).finish().ok().lines().count(), 2);
}

#[test]
fn ls_shows_how_a_key_is_shared() {
    let world = World::new();
    let hold = |name: &str, options: &[&str]| {
        let script = format!("touch $D/{name}; exec sleep 600");
        let running = world.stanchion([&["run"], options, &["-c", &script]].concat()).start();
        world.until_file(name);
        running
    };
    let _readers = [hold("r1", &["reading", "-s"]), hold("r2", &["reading", "-s"])];
    let _permits = [hold("p1", &["slots", "--permits", "3"]), hold("p2", &["slots", "--permits", "3"])];
    let _waiter = world.stanchion(["run", "reading", "--", "true"]).start();
    world.until_waiting("reading", 1);
    let text = world.stanchion(["ls"]).finish().ok();
    let rows: Vec<Vec<_>> = text.lines().skip(1).map(|line| line.split_whitespace().take(4).collect()).collect();
    for (row, mode) in rows.iter().zip(["shared", "shared", "2/3", "2/3"]) {
        assert_eq!(row[1..3], ["held", mode], "{text}");
    }
    let waiting = text.lines().next().unwrap().find("WAITING").unwrap();
    let numbers: Vec<_> = text.lines().skip(1).map(|line| &line[waiting..waiting + 1]).collect();
    assert_eq!(numbers, ["1", " ", "0", " "], "the waiters of a key are shown once: {text}");
}

#[test]
fn columns_survive_wide_characters() {
    let world = World::new();
    for key in ["鍵を守る", "ascii"] {
        world.stanchion(["run", key, "--cooldown", "1h", "--", "true"]).finish().code(0).silent();
    }
    let text = world.stanchion(["ls"]).finish().ok();
    // Four characters of two columns each: the column is eight wide.
    assert!(text.contains("\nascii     closed") && text.contains("\n鍵を守る  closed"), "{text}");
    // A program gets the whole key, and one long key moves no other row.
    let long = format!("{}/end", "k".repeat(300));
    world.stanchion(["run", &long, "--cooldown", "1h", "--", "true"]).finish().code(0).silent();
    let text = world.stanchion(["ls"]).finish().ok();
    assert!(text.contains(&format!("\n{long}  closed")), "{text}");
    assert!(text.lines().filter(|line| !line.contains("/end")).all(|line| line.chars().count() < 160), "{text}");
}

#[test]
fn check_answers_by_exit_code() {
    let world = World::new();
    let check = |key: &str| world.stanchion(["inspect", key, "--check"]).finish();
    check("k").code(0).silent();
    world.stanchion(["run", "closed", "--cooldown", "1h", "--", "true"]).finish().code(0);
    check("closed").code(75).silent();
    let holder = world.stanchion(["run", "k", "-c", "touch held; exec sleep 600"]).start();
    world.until_file("held");
    check("k").code(75).silent();
    let verbose = world.stanchion(["inspect", "k", "--check", "-v"]).finish();
    verbose.code(75).says(&["key `k` is not free: held by sh@"]);
    holder.send(Signal::TERM);
    holder.finish().code(143);
    check("k").code(0).silent();
    world.stanchion(["inspect", "", "--check"]).finish().code(64).says(&["a key may not be empty"]);
}

#[test]
fn watch_begins_before_the_store_exists() {
    let world = World::new();
    let mut watch = world.stanchion(["watch", "--interval", "10ms", "--json"]).start();
    let (sender, lines) = std::sync::mpsc::channel();
    let stdout = BufReader::new(watch.stdout());
    std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let next = || -> Value { serde_json::from_str(&lines.recv_timeout(LIMIT).unwrap()).unwrap() };
    // Whether it has looked by now or not, it must see this hold.
    let holder = world.stanchion(["run", "k", "-c", "touch held; exec sleep 600"]).start();
    world.until_file("held");
    assert_eq!(next()["key"], "k");
    holder.send(Signal::TERM);
    assert_eq!(next()["event"], "released");
    watch.send(Signal::TERM);
}

#[test]
fn nobody_who_reads_is_a_quiet_end() {
    let world = World::new();
    let _scene = scene(&world);
    for arguments in ["ls", "ls --json", "inspect closed", "watch", "man", "completions bash", "--help"] {
        let script = format!("({} {arguments}; echo $? > code) | true", env!("CARGO_BIN_EXE_stanchion"));
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &script]);
        world.prepare(&mut command);
        let out = command.output().unwrap();
        assert!(out.stderr.is_empty(), "{arguments}: {out:?}");
        until("the exit code", || !world.read("code").is_empty());
        assert_eq!(world.read("code"), "0\n", "{arguments}");
        std::fs::remove_file(world.path("code")).unwrap();
    }
}

#[test]
fn watch_ends_without_a_reader() {
    let world = World::new();
    let _scene = scene(&world);
    // The reader goes after the first line, and nothing changes from then on.
    let script = format!("({} watch --interval 10ms; echo $? > code) | head -n 1", env!("CARGO_BIN_EXE_stanchion"));
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &script]);
    world.prepare(&mut command);
    let mut shell = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    until("the exit code", || !world.read("code").is_empty());
    assert_eq!(world.read("code"), "0\n");
    shell.wait().unwrap();
}

#[test]
fn damaged_entries_are_named_by_ls() {
    let world = World::new();
    let _scene = scene(&world);
    let bad = world.stanchion(["run", "bad", "-c", "touch $D/bad; exec sleep 600"]).start();
    world.until_file("bad");
    let long = world.stanchion(["run", "long", "-c", "touch $D/long; exec sleep 600"]).start();
    world.until_file("long");
    let db = rusqlite::Connection::open(world.path("state/stanchion/locks.db")).unwrap();
    // No program of ours writes these rows.
    db.execute_batch(
        "UPDATE holds SET units = -1 WHERE key_id = (SELECT id FROM keys WHERE name = ':bad');
         UPDATE holds SET granted_wall = 9223372036854775807, metadata = printf('%.70000c', 'x')
             WHERE key_id = (SELECT id FROM keys WHERE name = ':long');
         INSERT INTO keys SELECT NULL, ':', fence, used, holders, waiting, capacity, next_deadline, closed_until,
             closed_until_wall, touched FROM keys WHERE name = ':long';",
    )
    .unwrap();
    let out = world.stanchion(["ls"]).finish();
    let keys: Vec<_> = out.stdout.lines().skip(1).map(|line| line.split("  ").next().unwrap().to_owned()).collect();
    assert_eq!(keys, ["closed", "job 1", "long"], "{out:?}");
    assert!(out.stdout.lines().all(|line| line.chars().count() < 300), "{out:?}");
    let said: Vec<_> = out.stderr.lines().collect();
    assert_eq!(said.len(), 2, "{out:?}");
    assert!(
        said[0].starts_with("stanchion: damaged entry `:`: ")
            && said[1].starts_with("stanchion: damaged entry `bad`: ")
    );
    out.code(65);
    // A pipe that nobody reads before the end has room for less.
    db.execute_batch("UPDATE holds SET metadata = printf('%.9000c', 'x') WHERE length(metadata) > 9000").unwrap();
    let json = world.stanchion(["ls", "--json"]).finish();
    let lines: Vec<Value> = json.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3);
    assert_eq!(lines[2]["holders"][0]["since"], "9999-12-31T23:59:59.999Z");
    assert_eq!(lines[2]["holders"][0]["metadata"].as_str().unwrap().len(), 9_000);
    json.code(65);
    world.stanchion(["ls", "job"]).finish().code(0);
    world.stanchion(["inspect", "long"]).finish().code(0);
    world.stanchion(["inspect", "bad"]).finish().code(70).says(&["key `bad` in sqlite: ", "cannot be read"]);
    bad.send(Signal::KILL);
    long.send(Signal::KILL);
}

#[test]
fn foreign_text_fakes_nothing() {
    let world = World::new();
    let key = "a  held  7\u{ad}\\n\u{202e}";
    let holder =
        world.stanchion(["run", key, "--metadata", "\u{200b}\u{7f}", "-c", "touch $D/held; exec sleep 600"]).start();
    world.until_file("held");
    let shown = r"a \u{20}held \u{20}7\u{ad}\\n\u{202e}";
    let text = world.stanchion(["ls"]).finish().ok();
    assert!(text.contains(shown) && text.contains(r"\u{200b}\u{7f}"), "{text}");
    let json = world.stanchion(["ls", "--json"]).finish().ok();
    assert!(json.contains(r#""a  held  7\u00ad\\n\u202e""#) && json.contains(r#""\u200b\u007f""#), "{json}");
    let parsed: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(parsed["key"], key);
    let busy = world.stanchion(["run", "-n", key, "--", "true"]).finish();
    assert!(busy.stderr.contains(shown), "{busy:?}");
    busy.code(75);
    holder.send(Signal::KILL);
}

#[test]
fn watch_tells_each_change_once() {
    let world = World::new();
    let _before = world.stanchion(["run", "job 0", "-c", "touch $D/before; exec sleep 600"]).start();
    world.until_file("before");
    let mut watch = world.stanchion(["watch", "job", "--interval", "10ms", "--json"]).start();
    let mut lines = BufReader::new(watch.stdout()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let first = next();
    assert_eq!((&first["event"], &first["key"]), (&"held".into(), &"job 0".into()));
    let holder = world.stanchion(["run", "job", "-c", "touch $D/held; exec sleep 600"]).start();
    let acquired = next();
    assert_eq!((&acquired["event"], &acquired["key"]), (&"acquired".into(), &"job".into()));
    assert!(humantime::parse_rfc3339(acquired["time"].as_str().unwrap()).is_ok());
    let waiter =
        world.stanchion(["run", "job", "--cooldown", "300ms", "-c", "touch $D/second; exec sleep 600"]).start();
    let waiting = next();
    assert_eq!(waiting["event"], "waiting");
    let gives_up = world.stanchion(["run", "job", "--", "true"]).start();
    assert_eq!(next()["event"], "waiting");
    gives_up.send(Signal::TERM);
    assert_eq!(next()["event"], "stopped_waiting");
    world.until_file("held");
    holder.send(Signal::TERM);
    let (released, second) = (next(), next());
    assert_eq!((&released["event"], &released["fence"]), (&"released".into(), &acquired["fence"]));
    assert_eq!((&second["event"], &second["owner"]), (&"acquired".into(), &waiting["owner"]));
    assert!(second["fence"].as_u64() > acquired["fence"].as_u64());
    world.until_file("second");
    waiter.send(Signal::TERM);
    assert_eq!(next()["event"], "released");
    assert_eq!(next()["event"], "closed");
    assert_eq!(next()["event"], "opened");
    watch.send(Signal::TERM);
}
