//! Help, completions and man pages: from one definition.
#![allow(clippy::unwrap_used, reason = "test code")]

use crate::common::*;

#[test]
fn help_and_version_go_to_stdout() {
    let world = World::new();
    let help = world.stanchion(["--help"]).finish().ok();
    for part in ["Examples:", "Exit codes:", "Environment:", "STANCHION_STORE", "STANCHION_FENCE", "Durations"] {
        assert!(help.contains(part), "no `{part}` in {help}");
    }
    for command in
        "run once elect wait acquire extend release ls inspect watch top force-release doctor bench schema completions man".split(' ')
    {
        assert!(help.contains(&format!("\n  {command} ")), "{command}");
        let text = world.stanchion([command, "--help"]).finish().ok();
        assert!(text.contains("Usage: stanchion "), "{text}");
        assert_eq!(world.stanchion(["help", command]).finish().ok(), text);
        let wide = text.lines().find(|line| line.chars().count() > 110);
        assert!(wide.is_none(), "{wide:?}");
    }
    assert_eq!(world.stanchion(["--version"]).finish().ok(), format!("stanchion {}\n", env!("CARGO_PKG_VERSION")));
    assert!(!help.contains("guardian"));
}

#[test]
fn help_is_about_one_command() {
    let world = World::new();
    let all = "run once elect wait acquire extend release ls inspect watch top force-release doctor bench schema completions man";
    for command in all.split(' ') {
        let short = world.stanchion([command, "-h"]).finish().ok();
        assert!(short.lines().count() <= 30 && !short.contains("Examples"), "{short}");
        let long = world.stanchion([command, "--help"]).finish().ok();
        let examples: Vec<_> = long.lines().skip_while(|line| *line != "Examples:").skip(1).collect();
        let lines = examples.iter().take_while(|line| !line.is_empty());
        // The effect of a long example is on the next line.
        for line in lines.filter(|line| !line.starts_with("   ")) {
            assert!(line.contains(&format!("stanchion {command}")), "another command's example: {long}");
        }
        assert!(!examples.is_empty(), "{long}");
        let is_of_run = ["run", "once", "elect"].contains(&command);
        assert_eq!(long.contains("the command was not found"), is_of_run, "{long}");
    }
}

#[test]
fn every_shell_has_completions() {
    let world = World::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let text = world.stanchion(["completions", shell]).finish().ok();
        assert!(text.contains("busy-exit-code") && !text.contains("guardian"), "{shell}");
        std::fs::write(world.path("completions"), text).unwrap();
        if shell == "bash" {
            let mut command = std::process::Command::new("bash");
            command.args(["-c", "source ./completions; COMP_WORDS=(stanchion in); COMP_CWORD=1; _stanchion stanchion in stanchion; echo ${COMPREPLY[@]}"]);
            world.prepare(&mut command);
            let out = command.output().unwrap();
            assert_eq!(String::from_utf8_lossy(&out.stdout), "inspect\n", "{out:?}");
        }
    }
}

#[test]
fn man_pages_are_printed_or_written() {
    let world = World::new();
    let page = world.stanchion(["man"]).finish().ok();
    assert!(page.contains(".TH \"stanchion\" 1") && page.contains(".SH \"EXIT STATUS\""), "{page}");
    world.stanchion(["man", "pages/man1"]).finish().code(0).silent();
    let mut pages: Vec<_> = std::fs::read_dir(world.path("pages/man1"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    pages.sort();
    let commands = "acquire bench completions doctor elect extend force-release inspect ls man once release run schema top \
                    wait watch";
    let expected: Vec<_> = commands.split(' ').map(|name| format!("stanchion-{name}.1")).collect();
    assert_eq!(pages, [expected, vec!["stanchion.1".to_owned()]].concat());
    let run = world.read("pages/man1/stanchion-run.1");
    assert!(run.contains("max\\-hold") && run.contains("the key was lost while the command ran"), "{run}");
    let refused = world.stanchion(["man", "/proc/pages"]).finish();
    refused.code(70).says(&["cannot write man pages into `/proc/pages`"]);
}
