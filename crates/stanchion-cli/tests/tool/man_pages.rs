//! Man pages, as a reader's program shows them.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;

/// Returns a page as a terminal of 80 columns shows it, or `None` if this machine has no `man`.
fn shown(world: &World, page: &str) -> Option<String> {
    let mut command = std::process::Command::new("man");
    command.args(["--warnings", "-l"]).arg(world.path("pages").join(page));
    world.prepare(&mut command);
    // Bold is by overstriking: MAN_KEEP_FORMATTING is not set, so a pipe gets plain text.
    command.env("MANWIDTH", "80").env("LC_ALL", "C.UTF-8");
    let out = command.output().ok()?;
    // A system that was made smaller has a `man` that only says so.
    let text = String::from_utf8(out.stdout).unwrap();
    if !out.status.success() || !text.contains("NAME") {
        return None;
    }
    assert!(out.stderr.is_empty(), "{page}: {}", String::from_utf8_lossy(&out.stderr));
    Some(text)
}

#[test]
fn man_shows_tables_as_they_are() {
    let world = World::new();
    world.stanchion(["man", "pages"]).finish().code(0).silent();
    let pages: Vec<_> = std::fs::read_dir(world.path("pages"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for page in &pages {
        let Some(text) = shown(&world, page) else {
            return eprintln!("NOT TESTED: how man pages look: this machine has no `man -l` (Debian: package man-db)");
        };
        for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "ENVIRONMENT", "EXAMPLES"] {
            assert!(text.lines().any(|line| line == section), "no {section} in {page}:\n{text}");
        }
        let wide = text.lines().find(|line| line.chars().count() > 80);
        assert_eq!(wide, None, "{page}:\n{text}");
        // Each example is on a line of its own, and its effect below it.
        let (_, examples) = text.split_once("\nEXAMPLES\n").unwrap();
        let example = examples.lines().next().unwrap();
        assert!(example.starts_with("       ") && example.contains("stanchion"), "{page}:\n{text}");
        let effect = examples.lines().nth(1).unwrap();
        assert!(effect.starts_with("           "), "{page}:\n{text}");
    }
    let ls = shown(&world, "stanchion-ls.1").unwrap();
    // Filled, the first line would begin in the line before it.
    let rows = [
        "       With --runs, one object per key that `once` has run:",
        "         last_fence     the newest fence of the key, or null",
    ];
    for row in rows {
        assert!(ls.lines().any(|line| line == row), "no line `{row}` in\n{ls}");
    }
    let run = shown(&world, "stanchion-run.1").unwrap();
    assert!(run.lines().any(|line| line == "       stanchion run k -c 'date > today; sync'"), "{run}");
    assert!(run.lines().any(|line| line.starts_with("       75       the key was not obtained within")), "{run}");
}
