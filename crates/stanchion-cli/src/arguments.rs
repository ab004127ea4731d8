//! The command line: the one definition from which parsing, help, completions and man pages come.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use stanchion::Demand;

use crate::duration::{span, span_or_zero};
use crate::exit_code;

const EXAMPLES: &str = "\
Examples:
  stanchion run nightly -- ./backup.sh              wait for the key, then run
  stanchion run nightly -n -- ./backup.sh           give up at once if it is taken (exit 75)
  stanchion run deploy -w 5m -- make deploy         wait for 5 minutes at most
  stanchion run api --permits 3 -- ./call.sh        three at a time
  stanchion once report --every 1h -- ./report.sh   at most once an hour, for cron on many machines
  stanchion ls                                      who holds what, who waits
  stanchion run k -c 'date > today; sync'           a line for the shell
  STANCHION_STORE=sqlite:/srv/locks stanchion ls    another store than your own folder

Durations (DUR):
  30, 1.5 (seconds), 500ms, 30s, 5m, 2h, 1d, '1h 30m'; from 10ms to 30d

Environment:
  STANCHION_STORE       URL of the store; without it, a folder of the user: this machine only
  STANCHION_STORE_FILE  a file whose first line is that URL
  STANCHION_KEY         given to the command: the key
  STANCHION_FENCE       given to the command: the fence of this hold, a decimal number that grows
                        with every hold of the key; send it along, let the receiver refuse lower ones
";

fn fence(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("`{text}` is not a fence: write the number that `ls` and `inspect` show"))
}

fn whole<T: TryFrom<u64>>(text: &str, least: u64, most: u64) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number));
    let number = number.and_then(|number| T::try_from(number).ok());
    number.ok_or_else(|| format!("`{text}` is not a whole number from {least} to {most}"))
}

fn permits(text: &str) -> Result<u32, String> {
    whole(text, 1, Demand::MAX.into())
}

fn tasks(text: &str) -> Result<usize, String> {
    whole(text, 1, 1_000)
}

fn slot(text: &str) -> Result<u64, String> {
    whole(text, 0, u64::MAX)
}

fn code(text: &str) -> Result<u8, String> {
    whole(text, 0, u8::MAX.into())
}

/// The text after `--help` of the tool and of the commands that run something.
fn after_help() -> String {
    format!("{EXAMPLES}\n{}", exit_code::HELP)
}

/// Run one command at a time, across processes and machines.
///
/// `stanchion run KEY -- CMD` runs CMD while it holds KEY. Other runs with the same KEY wait, first
/// come, first served. With no store given it works between the processes of one user on one
/// machine, without any server.
#[derive(Debug, Parser)]
#[command(name = "stanchion", version, after_long_help = after_help(), verbatim_doc_comment)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Args, Debug)]
pub(crate) struct Common {
    /// The store: sqlite:FOLDER, or the URL of a server, without a password in it
    ///
    /// A URL with a password is refused here, because every user of the machine can read the
    /// arguments of a program: put it into STANCHION_STORE or into a file for --store-file.
    /// The default is a folder of the user: $XDG_STATE_HOME/stanchion, or
    /// ~/.local/state/stanchion.
    #[arg(
        verbatim_doc_comment,
        long,
        global = true,
        value_name = "URL",
        conflicts_with = "store_file",
        display_order = 100
    )]
    pub(crate) store: Option<String>,
    /// A file whose first line is the URL of the store
    #[arg(long, global = true, value_name = "PATH", display_order = 101)]
    pub(crate) store_file: Option<PathBuf>,
    /// Print nothing: the exit code tells the result
    #[arg(short, long, global = true, conflicts_with = "verbose", display_order = 102)]
    pub(crate) quiet: bool,
    /// Also report progress: the store, who holds the key, the wait and the release
    #[arg(short, long, global = true, display_order = 103)]
    pub(crate) verbose: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a command while holding a key
    ///
    /// Waits for KEY, first come, first served, runs CMD and ends with CMD's exit code. The key is free
    /// again the moment CMD has ended, also when CMD left processes behind in the background.
    ///
    /// CMD has its own process group; signals sent to stanchion are passed on to it (a second INT or
    /// TERM kills it), and a terminal is handed over, so that interactive programs and Ctrl-Z work. If
    /// the key is lost while CMD runs, the whole group gets SIGTERM, and SIGKILL before anyone else can
    /// have the key. If stanchion itself is killed, the group is killed with it. A process that leaves
    /// the group (setsid) is not killed; in the embedded store it then keeps the key until it ends.
    #[command(verbatim_doc_comment, after_long_help = after_help())]
    Run(Run),
    /// Run a command at most once per period: the guard for cron
    ///
    /// Runs CMD, unless another process runs it now or it was done for this period or slot. Then it does
    /// nothing and ends with exit code 0, in silence unless it writes to a terminal. A command that fails
    /// does not count, so that the next machine can try. `inspect KEY` shows the last run.
    #[command(verbatim_doc_comment, after_long_help = after_help())]
    Once(Once),
    /// List the keys that are held, waited for or closed
    #[command(after_long_help = crate::output::JSON_HELP)]
    Ls(Ls),
    /// Show one key: holders, queue, fences, the last run
    #[command(after_long_help = crate::output::JSON_HELP)]
    Inspect(Inspect),
    /// Print a line for every change
    ///
    /// Looks at the keys once per --interval and prints the differences; a hold that begins and ends
    /// between two looks is not seen. The first look prints all holds.
    #[command(verbatim_doc_comment, after_long_help = crate::output::JSON_HELP)]
    Watch(Watch),
    /// End the hold of another process
    ///
    /// Ends the hold that has this fence, and no other: if the key has changed hands since you looked,
    /// nothing happens (exit code 1). A `stanchion run` that loses its key this way kills its command at
    /// once, because the next command may start.
    #[command(verbatim_doc_comment)]
    #[command(name = "force-release", visible_alias = "break")]
    ForceRelease(ForceRelease),
    /// Show keys, holders and queues on a full screen
    ///
    /// Looks at the keys once a second, because a store notifies holders and waiters only: a hold that
    /// begins and ends between two looks is not seen. Keys with the most waiters come first, then the
    /// oldest. Up and down select a hold, f ends it by force after a reason and a confirmation, q quits.
    /// An outage of the store is reported, and top goes on.
    #[command(verbatim_doc_comment)]
    Top(Top),
    /// Check the store: can it be reached, used and trusted
    ///
    /// Prints a line per check: ok, warning, failed or skipped. Holds a key of its own for a moment, and
    /// creates no store. The exit code is that of the first check that failed: 69 the store cannot be
    /// reached, 77 a right is missing, 78 it is misconfigured.
    #[command(verbatim_doc_comment, after_long_help = crate::output::DOCTOR_HELP)]
    Doctor(Doctor),
    /// Measure the store
    ///
    /// Measures an acquire, a release and a hand-off with one task and with several tasks of one process.
    /// Uses keys of its own, and holds none of them afterwards. Puts load on the store while it runs.
    #[command(verbatim_doc_comment, after_long_help = crate::output::BENCH_HELP)]
    Bench(Bench),
    /// Print or run the SQL that creates the schema of a PostgreSQL store
    ///
    /// The role that runs it needs the right to create and becomes the schema's owner; roles that use
    /// the locks do not need it. Running it again changes nothing.
    #[command(verbatim_doc_comment)]
    Schema {
        /// Run it instead of printing it
        #[arg(long)]
        apply: bool,
    },
    /// Print the completions for a shell
    Completions {
        /// The shell
        #[arg(value_name = "SHELL")]
        shell: clap_complete::Shell,
    },
    /// Print the man page, or write all of them into a folder
    Man {
        /// Where to write stanchion.1, stanchion-run.1 and so on
        #[arg(value_name = "DIR")]
        folder: Option<PathBuf>,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Run {
    /// The key: 1 to 512 bytes of UTF-8
    #[arg(value_name = "KEY")]
    pub(crate) key: String,
    /// Do not wait: give up at once if the key is taken
    ///
    /// A store that does not answer within about a second is unavailable (exit 69). For a store
    /// that is slower than that, use --wait.
    #[arg(verbatim_doc_comment, short, long, conflicts_with = "wait")]
    pub(crate) no_wait: bool,
    /// Wait no longer than this; 0 is one attempt
    ///
    /// The limit covers opening the store too. While the store is away, stanchion keeps trying
    /// until the limit (exit 69 then). Without a limit it gives up after 10 seconds if the store is
    /// away at the start, and waits through any outage once it is in the queue.
    #[arg(verbatim_doc_comment, short, long, value_name = "DUR", value_parser = span_or_zero, allow_hyphen_values = true)]
    pub(crate) wait: Option<Duration>,
    /// Share the key with other runs that use --shared
    ///
    /// A run with --permits N counts each --shared run as one of its N.
    #[arg(short, long, conflicts_with = "permits")]
    pub(crate) shared: bool,
    /// Hold the key alone: the default
    #[arg(short = 'x', long, conflicts_with_all = ["permits", "shared"])]
    pub(crate) exclusive: bool,
    /// Let this many hold the key at a time; if the runs differ, the smaller number counts
    #[arg(long, value_name = "N", value_parser = permits, allow_hyphen_values = true)]
    pub(crate) permits: Option<u32>,
    /// Keep the key closed for this long after the command has ended
    #[arg(long, value_name = "DUR", value_parser = span, allow_hyphen_values = true)]
    pub(crate) cooldown: Option<Duration>,
    /// The exit code if the key was not obtained
    #[arg(short = 'E', long, value_name = "N", value_parser = code, allow_hyphen_values = true)]
    #[arg(default_value_t = exit_code::NOT_OBTAINED)]
    pub(crate) busy_exit_code: u8,
    #[command(flatten)]
    pub(crate) child: Child,
}

#[derive(Args, Debug)]
pub(crate) struct Once {
    /// The key: 1 to 512 bytes of UTF-8
    #[arg(value_name = "KEY")]
    pub(crate) key: String,
    /// The period: not again until nine tenths of it have passed since the last run began
    ///
    /// The last tenth is for clocks that differ and a cron that is late. A run that fails does not
    /// count, nor one whose machine dies.
    #[arg(verbatim_doc_comment, long, value_name = "DUR", value_parser = span, allow_hyphen_values = true)]
    #[arg(required_unless_present = "slot")]
    pub(crate) every: Option<Duration>,
    /// A number that rises with the schedule, such as $(date +%Y%m%d): not if it, or a later one, was done
    #[arg(long, value_name = "N", value_parser = slot, allow_hyphen_values = true)]
    pub(crate) slot: Option<u64>,
    /// The exit code if it is not run
    #[arg(short = 'E', long, value_name = "N", value_parser = code, allow_hyphen_values = true)]
    #[arg(default_value_t = exit_code::OK)]
    pub(crate) busy_exit_code: u8,
    #[command(flatten)]
    pub(crate) child: Child,
}

/// Options of both `run` and `once`.
#[derive(Args, Debug)]
pub(crate) struct Child {
    /// How long the store keeps the key after this machine has fallen silent (default 10s)
    ///
    /// A server frees the keys of a program that it has not heard of for this long. The embedded store
    /// needs no such limit: it knows at once when a program has died.
    #[arg(verbatim_doc_comment, long, value_name = "DUR", value_parser = span, allow_hyphen_values = true)]
    pub(crate) ttl: Option<Duration>,
    /// Hold the key for this long at most; then end the command (exit 76)
    #[arg(long, value_name = "DUR", value_parser = span, allow_hyphen_values = true)]
    pub(crate) max_hold: Option<Duration>,
    /// Time between SIGTERM and SIGKILL when the key is lost
    ///
    /// It is cut short where another could have the key before.
    #[arg(long, value_name = "DUR", value_parser = span_or_zero, default_value = "5s", allow_hyphen_values = true)]
    pub(crate) kill_after: Duration,
    /// A text that `ls` and `inspect` show with this hold, up to 4 KiB
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) metadata: Option<String>,
    /// Run this text in a shell (sh -c) instead of a command
    #[arg(short = 'c', long, value_name = "STRING", conflicts_with = "command", allow_hyphen_values = true)]
    pub(crate) shell: Option<OsString>,
    /// The command and its arguments, as they are: no shell reads them
    #[arg(value_name = "CMD", last = true, required_unless_present = "shell")]
    pub(crate) command: Vec<OsString>,
}

#[derive(Args, Debug)]
pub(crate) struct Ls {
    /// Only keys that begin with this
    #[arg(value_name = "PREFIX", default_value = "", hide_default_value = true)]
    pub(crate) prefix: String,
    /// One JSON object per key and line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// The key
    #[arg(value_name = "KEY")]
    pub(crate) key: String,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Watch {
    /// Only keys that begin with this
    #[arg(value_name = "PREFIX", default_value = "", hide_default_value = true)]
    pub(crate) prefix: String,
    /// How often to look
    #[arg(long, value_name = "DUR", value_parser = span, default_value = "1s", allow_hyphen_values = true)]
    pub(crate) interval: Duration,
    /// One JSON object per change and line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ForceRelease {
    /// The key
    #[arg(value_name = "KEY")]
    pub(crate) key: String,
    /// The fence of the hold to end, as `ls` and `inspect` show it
    #[arg(long, value_name = "F", value_parser = fence, allow_hyphen_values = true)]
    pub(crate) fence: u64,
    /// The reason, shown to the user whose command loses the key
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) reason: String,
}

#[derive(Args, Debug)]
pub(crate) struct Top {
    /// Only keys that begin with this
    #[arg(value_name = "PREFIX", default_value = "", hide_default_value = true)]
    pub(crate) prefix: String,
}

#[derive(Args, Debug)]
pub(crate) struct Doctor {
    /// One JSON object per check and line
    #[arg(long)]
    pub(crate) json: bool,
    /// End with 78 if there are warnings
    #[arg(long)]
    pub(crate) strict: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Bench {
    /// How long each of the measurements lasts
    #[arg(long = "for", value_name = "DUR", value_parser = span, default_value = "3s", allow_hyphen_values = true)]
    pub(crate) length: Duration,
    /// How many tasks to measure with, after one alone
    #[arg(long, value_name = "N", value_parser = tasks, default_value = "16", allow_hyphen_values = true)]
    pub(crate) tasks: usize,
    /// One JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn argument_definition_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn options_after_dashes_go_to_the_command() {
        let arguments = Arguments::try_parse_from(["stanchion", "run", "k", "-n", "--", "ls", "-n", "--json"]).unwrap();
        let Command::Run(run) = arguments.command else { panic!("not run") };
        assert!(run.no_wait);
        assert_eq!(run.child.command, ["ls", "-n", "--json"]);
    }
}
