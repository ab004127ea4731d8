//! Wrong inputs: each message is one line that says what was wrong and what would be right, and nothing is begun.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt;

use crate::bad_input::nothing_is_left;
use crate::common::*;

/// A wrong command line, its exit code, and texts of its message.
type Row = (&'static [&'static str], i32, &'static [&'static str]);

const COMMANDS: [Row; 21] = [
    (&[], 64, &["a command is missing; the commands are run, once", "schema", "stanchion --help"]),
    (&["frob"], 64, &["unrecognized subcommand 'frob'; the commands are run, once", "`stanchion --help` explains it"]),
    (&["inspct", "k"], 64, &["unrecognized subcommand 'inspct'", "a similar subcommand exists: 'inspect'"]),
    (&["nightly", "--", "true"], 64, &["unrecognized subcommand 'nightly'", "write `stanchion run KEY -- CMD`"]),
    (
        &["run"],
        64,
        &["<KEY>", "the key comes first, and then the command to run", "`stanchion run --help` explains it"],
    ),
    (&["run", "k"], 64, &["<CMD>", "the key comes first, and then the command to run"]),
    (
        &["run", "k", "--wiat", "5", "--", "true"],
        64,
        &["argument '--wiat' found; a similar argument exists: '--wait'; `stanchion run"],
    ),
    (&["run", "k", "--", ""], 64, &["the command is empty: give a program and its arguments"]),
    (&["run", "k", "--", "no-such-program"], 127, &["`no-such-program`", "not found"]),
    (&["run", "k", "--", "/"], 126, &["`/`"]),
    (&["once", "k", "--", "true"], 64, &["--every <DUR>", "give the period (--every DUR)", "(--slot N)"]),
    (&["once", "k", "--force", "--", "true"], 64, &["give the period (--every DUR)"]),
    (&["once", "k", "--forget", "--", "true"], 64, &["'--forget' cannot be used with '[CMD]"]),
    (&["inspect"], 64, &["<KEY>; write stanchion inspect <KEY>; `stanchion inspect --help` explains it"]),
    (&["inspect", "k", "--check", "--json"], 64, &["cannot be used with"]),
    (&["ls", "a", "b"], 64, &["unexpected argument 'b' found; write stanchion ls [OPTIONS] [PREFIX]"]),
    (&["watch", "--interval", "0"], 64, &["`0` is too short: the least is 10ms"]),
    (&["force-release", "k"], 64, &["no terminal to ask at: give --fence F --reason TEXT", "`stanchion inspect KEY`"]),
    (&["force-release", "k", "--fence", "x", "--reason", "y"], 64, &["`x` is not a fence: write the number that `ls`"]),
    (&["force-release", "k", "--fence", "-1", "--reason", "y"], 64, &["`-1` is not a fence"]),
    (&["completions", "frob"], 64, &["invalid value 'frob'", "bash"]),
];

/// Wrong options of `run` and `once`, before the command `touch started`.
const OPTIONS: [Row; 20] = [
    (&["run", ""], 64, &["a key may not be empty; give it 1 to 512 bytes"]),
    (&["once", "", "--every", "1h"], 64, &["a key may not be empty"]),
    (&["once", "k", "--every", "0"], 64, &["`0` is too short: the least is 10ms"]),
    (&["once", "k", "--every", "31d"], 64, &["`31d` is too long: the most is 30d"]),
    (&["once", "k", "--slot", "-1"], 64, &["`-1` is not a whole number from 0 to 18446744073709551615"]),
    (&["once", "k", "--slot", "monday"], 64, &["`monday` is not a whole number"]),
    (&["run", "k", "-w", "soon"], 64, &["`soon` is not a duration: write seconds (30, 1.5)", "stanchion run --help"]),
    (&["run", "k", "-w", "-5"], 64, &["`-5` is not a duration"]),
    (&["run", "k", "-w", "5 parsecs"], 64, &["`5 parsecs` is not a duration", "(500ms, 30s, 5m, 2h)"]),
    (&["run", "k", "-w", "99999999999999999999999999"], 64, &["is too long: the most is 30d"]),
    (&["run", "k", "--ttl", "0"], 64, &["`0` is too short"]),
    (&["run", "k", "--ttl", "1000d"], 64, &["is too long"]),
    (&["run", "k", "--max-hold", "0"], 64, &["is too short"]),
    (&["run", "k", "--cooldown", "9ms"], 64, &["is too short"]),
    (&["run", "k", "--permits", "0"], 64, &["`0` is not a whole number from 1 to 2147483647"]),
    (&["run", "k", "--permits", "x"], 64, &["`x` is not a whole number from 1"]),
    (&["run", "k", "--permits", "2147483648"], 64, &["is not a whole number from 1"]),
    (&["run", "k", "-E", "256"], 64, &["`256` is not a whole number from 0 to 255"]),
    (&["run", "k", "-n", "-w", "5"], 64, &["cannot be used with"]),
    (&["run", "k", "-s", "-x"], 64, &["cannot be used with"]),
];

/// A wrong URL, its exit code, and texts of its message.
type Url = (&'static str, i32, &'static [&'static str]);

const URLS: [Url; 35] = [
    ("frob:x", 64, &["there is no store for `frob:` URLs", "`sqlite:`, `redis:`"]),
    ("memory:", 64, &["which no other process can see: write sqlite:/FOLDER"]),
    ("locks", 64, &["holds no URL: write sqlite:/FOLDER, redis://HOST or postgres://HOST/DATABASE"]),
    (":6379", 64, &["holds no URL: write sqlite:/FOLDER"]),
    ("/srv/locks", 64, &["holds a path and no URL: write sqlite:/srv/locks"]),
    ("~/locks", 64, &["holds a path and no URL: write sqlite:~/locks"]),
    ("localhost:6379", 64, &["no scheme: write redis://localhost:6379"]),
    ("db.example:5432/app", 64, &["no scheme: write postgres://db.example:5432/DATABASE"]),
    ("\"redis://h\"", 64, &["has quotes around the URL", "remove them"]),
    ("'redis://h'", 64, &["has quotes around the URL"]),
    ("STANCHION_STORE=redis://h", 64, &["holds an assignment: write the URL alone"]),
    ("REDIS://h", 64, &["has a scheme in capitals: write `redis:`"]),
    ("Sqlite:/srv/locks", 64, &["has a scheme in capitals: write `sqlite:`"]),
    ("valkey://h", 64, &["has the scheme of another program: write redis://"]),
    ("file:///srv/locks", 64, &["has the scheme of another program: write sqlite:/FOLDER"]),
    ("sqlite:locks", 64, &["relative folder", "write sqlite:/ABSOLUTE/FOLDER or sqlite:~/FOLDER"]),
    ("sqlite:~other/locks", 64, &["relative folder"]),
    ("sqlite://srv/locks", 64, &["must be followed by an absolute path: write `sqlite:/folder`"]),
    ("sqlite:/a?mode=ro", 64, &["has no option `mode`; write %3F for a question mark"]),
    ("sqlite:/a%zz", 64, &["two hexadecimal digits"]),
    ("redis:h", 64, &["needs `://` after its scheme, for example `redis://127.0.0.1:6379`"]),
    ("redis://", 64, &["a host is missing", "write `host:port`"]),
    ("redis://h:65536", 64, &["a port is not a number from 1 to 65535"]),
    ("redis://h:0", 64, &["a port is not a number from 1 to 65535"]),
    ("redis://::1", 64, &["write an IPv6 address in [brackets], for example `[::1]:6379`"]),
    ("redis://h?timeout=5", 64, &["unknown option `timeout`; the options are `prefix`, `min_replicas`"]),
    ("redis://h/x", 64, &["the database must be a whole number"]),
    ("redis://a,b", 64, &["takes one host; for several use `redis+cluster://` or `redis+sentinel://`"]),
    ("redis+sentinel://h", 64, &["the service is missing", "`redis+sentinel://host1,host2/mymaster`"]),
    ("redis+cluster://h/1", 64, &["a cluster has no databases: omit the path"]),
    ("redis+tls://h", 64, &["unknown scheme; the schemes are redis, rediss"]),
    ("postgres://", 64, &["a host is missing", "`postgres://host:5432/database`"]),
    ("postgres://h:65536/app", 64, &["`port` must be a number from 1 to 65535"]),
    ("postgres://h/app?colour=red", 64, &["unknown option `colour`; the options are `schema`"]),
    ("postgres://h/app?sslmode=prefer", 64, &["`sslmode` must be `disable` or `verify-full`"]),
];

#[test]
fn wrong_command_lines_say_what_is_right() {
    let world = World::new();
    for (arguments, code, texts) in COMMANDS {
        world.stanchion(arguments).finish().code(code).says(texts);
    }
    for (arguments, code, texts) in OPTIONS {
        let arguments = arguments.iter().chain(&["--", "touch", "started"]);
        world.stanchion(arguments).finish().code(code).says(texts);
    }
    nothing_is_left(&world);
}

/// A NUL cannot be in an argument: the system ends it there. The library's own tests have that case.
#[test]
fn wrong_texts_say_their_limits() {
    let world = World::new();
    let long = "x".repeat(513);
    let run = |arguments: &[&OsStr]| {
        let command = ["--", "touch", "started"].map(OsStr::new);
        world.stanchion([&[OsStr::new("run")], arguments, &command].concat()).finish()
    };
    run(&[long.as_ref()])
        .code(64)
        .says(&["the key has 513 bytes, the longest allowed is 512; hash the long part of it"]);
    run(&[OsStr::from_bytes(b"\xff")]).code(64).says(&["keys and options are UTF-8"]);
    nothing_is_left(&world);
    let long = "x".repeat(512);
    world.stanchion(["run", &long, "--", "true"]).finish().code(0).silent();
    let metadata = "x".repeat(4097);
    let finished = world.stanchion(["run", "k", "--metadata", &metadata, "--", "touch", "started"]).finish();
    finished.code(64).says(&["the metadata has 4097 bytes, the longest allowed is 4096"]);
    let blank = world.stanchion(["force-release", "k", "--fence", "1", "--reason", " "]).finish();
    blank.code(64).says(&["needs a reason of 1 to 4096 bytes"]);
    let gone = world.stanchion(["force-release", "k", "--fence", "1", "--reason", "x"]).finish();
    gone.code(1).says(&["no hold of key `k` has fence 1; nobody holds it now; nothing was changed"]);
    assert!(!world.path("started").exists());
    world.assert_free("k");
}

#[test]
fn wrong_urls_say_what_is_right() {
    let world = World::new();
    for (number, (url, code, texts)) in URLS.into_iter().enumerate() {
        let run = |options: &[&str]| world.stanchion([&["run", "k"], options, &["--", "touch", "started"]].concat());
        run(&["--store", url]).finish().code(code).says(texts);
        world.stanchion(["ls"]).env("STANCHION_STORE", url).finish().code(code).says(texts);
        let file = format!("url{number}");
        world.write_store_file(&file, &format!("{url}\n"));
        run(&["--store-file", &file]).finish().code(code).says(texts);
    }
    let blanks = world.stanchion(["ls", "--store", " redis://h"]).finish();
    blanks.code(64).says(&["--store has blanks around the URL: remove them"]);
    let blanks = world.stanchion(["ls"]).env("STANCHION_STORE", "sqlite:/srv/locks ").finish();
    blanks.code(64).says(&["STANCHION_STORE has blanks around the URL: remove them"]);
    let both = world.stanchion(["ls", "--store", "sqlite:", "--store-file", "f"]).finish();
    both.code(64).says(&["'--store <URL>' cannot be used with '--store-file <PATH>'"]);
    let password = world.stanchion(["ls", "--store", "redis://:hunter2@h"]).finish();
    password.code(64).says(&["put the URL into the environment (STANCHION_STORE) or into a file (--store-file PATH)"]);
    nothing_is_left(&world);
}

#[test]
fn wrong_store_files_say_what_is_right() {
    let world = World::new();
    world.write_store_file("empty", "");
    world.write_store_file("blank", "\nsqlite:\n");
    world.write_store_file("comment", "# the store\nsqlite:\n");
    std::fs::create_dir(world.path("folder")).unwrap();
    std::fs::set_permissions(world.path("folder"), PermissionsExt::from_mode(0o700)).unwrap();
    let table: [(&str, &[&str]); 5] = [
        ("empty", &["the first line of `empty` (of --store-file) holds no URL: write sqlite:/FOLDER"]),
        ("blank", &["the first line of `blank` (of --store-file) holds no URL"]),
        ("comment", &["the first line of `comment` (of --store-file) holds no URL"]),
        ("folder", &["cannot read `folder` (of --store-file)", "name a file with the store's URL in its first line"]),
        ("nowhere", &["cannot read `nowhere` (of --store-file)", "name a file with the store's URL in its first line"]),
    ];
    for (file, texts) in table {
        let code = if texts[0].starts_with("cannot") { 78 } else { 64 };
        world.stanchion(["run", "k", "--store-file", file, "--", "touch", "started"]).finish().code(code).says(texts);
    }
    // Some editors put a mark before the first character.
    world.write_store_file("marked", "\u{feff}sqlite:\r\n");
    world.stanchion(["ls", "--store-file", "marked"]).finish().code(0).silent();
    nothing_is_left(&world);
}

/// A folder of the system may have to be open to others, and two folders do not exclude each other's programs.
#[test]
fn unusable_folders_name_a_safe_remedy() {
    let world = World::new();
    std::fs::write(world.path("file"), "").unwrap();
    std::fs::create_dir(world.path("open")).unwrap();
    std::fs::set_permissions(world.path("open"), PermissionsExt::from_mode(0o755)).unwrap();
    let url = |name: &str| format!("sqlite:{}", world.path(name).display());
    let (file, open, below) = (url("file"), url("open"), url("file/locks"));
    let inside = format!("for example {}/stanchion, in every program", world.path("open").display());
    let foreign = "belongs to user";
    let table: [(&str, &[&str]); 6] = [
        ("sqlite:/tmp", &[if rustix::process::geteuid().is_root() { "for example /tmp/stanchion" } else { foreign }]),
        ("sqlite:/", &["/"]),
        ("sqlite:/proc/locks", &["/proc"]),
        (&file, &["is not a folder"]),
        (&below, &["file"]),
        (&open, &["other users may enter", &inside]),
    ];
    for (url, texts) in table {
        let finished = world.stanchion(["run", "k", "--store", url, "--", "touch", "started"]).finish().says(texts);
        assert!(!finished.stderr.contains("chmod"), "{url}: {finished:?}");
        assert!([69, 77, 78].contains(&finished.code.unwrap()), "{url}: {finished:?}");
    }
    // The store's own folder may be mended.
    let mine = url("mine");
    world.stanchion(["run", "k", "--store", &mine, "--", "true"]).finish().code(0);
    std::fs::set_permissions(world.path("mine"), PermissionsExt::from_mode(0o755)).unwrap();
    let mended = format!("run `chmod 700 {}`", world.path("mine").display());
    world.stanchion(["ls", "--store", &mine]).finish().code(78).says(&[&mended]);
    nothing_is_left(&world);
}

#[test]
fn missing_home_is_misconfigured() {
    let world = World::new();
    let without_state = || world.stanchion(["ls"]).env_remove("XDG_STATE_HOME");
    for homeless in
        [without_state().env_remove("HOME"), without_state().env("HOME", "/"), without_state().env("HOME", "")]
    {
        homeless.finish().code(78).says(&["set HOME or XDG_STATE_HOME, or name a folder (sqlite:/FOLDER)"]);
    }
    let tilde = world.stanchion(["ls", "--store", "sqlite:~/locks"]).env("HOME", "/").finish();
    tilde.code(64).says(&["HOME names no home: write an absolute folder"]);
}

/// The store of another user is never opened, and the advice never leads to a second store.
#[test]
fn folder_of_another_user_is_misconfigured() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("NOT TESTED: only root can give a folder to another user");
    }
    let world = World::new();
    std::fs::create_dir(world.path("theirs")).unwrap();
    std::os::unix::fs::chown(world.path("theirs"), Some(64_000), Some(64_000)).unwrap();
    let url = format!("sqlite:{}", world.path("theirs").display());
    let finished = world.stanchion(["run", "k", "--store", &url, "--", "touch", "started"]).finish().code(78);
    finished.says(&["belongs to user 64000", "run it as that user, or use a store with a server"]);
    nothing_is_left(&world);
}

#[test]
fn store_of_sudo_is_noted() {
    let world = World::new();
    let run = |option: &str| world.stanchion(["run", option, "k", "--", "true"]).env("SUDO_USER", "ann");
    let note = "not that of user `ann` who called: the two do not exclude each other's commands";
    let verbose = run("-v").finish().code(0).reports(&[note, "store: sqlite:/"]);
    assert_eq!(verbose.stderr.matches(note).count(), 1, "{verbose:?}");
    run("-n").finish().code(0).silent();
    let named = format!("sqlite:{}", world.path("named").display());
    let named = run("-v").env("STANCHION_STORE", named).finish().code(0);
    assert!(!named.stderr.contains("ann"), "{named:?}");
}
