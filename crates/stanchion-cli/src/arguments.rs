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
  eval \"$(stanchion acquire k --export)\"            hold it in a script, until its end or `release`
  stanchion ls                                      who holds what, who waits
  stanchion run k -c 'date > today; sync'           a line for the shell
  STANCHION_STORE=sqlite:/srv/locks stanchion ls    another store than your own folder

Durations (DUR):
  30, 1.5 (seconds), 500ms, 30s, 5m, 2h, 1d, '1h 30m'; from 10ms to 30d

Environment:
  STANCHION_STORE       URL of the store; without it, a folder of the user: this machine only
  STANCHION_STORE_FILE  a file whose first line is that URL
  STANCHION_KEY         given to the command: the key
  STANCHION_TOKEN       the token of a hold, for extend and release
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

fn pid(text: &str) -> Result<i32, String> {
    whole(text, 1, i32::MAX as u64)
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
    /// Obtain a key and return while it stays held, for scripts
    ///
    /// The key stays held until `release`, and
    ///
    ///   - without --ttl: at most until the process ends that called stanchion, which is the shell of a
    ///     script, or the one that --pid names. A process in the background holds the key until then;
    ///   - with --ttl: at most for that time, whatever becomes of any process. `extend` renews it.
    ///
    /// Prints the token of the hold and its fence, a line each. Anybody with the token can end the hold.
    /// Nobody tells the script if the key is lost (force-release; a store that is away for longer than
    /// 10 seconds): send the fence along with what the script changes. A command that fits into one call
    /// is safer with `run`, which ends the command then.
    #[command(verbatim_doc_comment, after_long_help = SCRIPT_EXAMPLES)]
    Acquire(Acquire),
    /// Set the time left of a hold of `acquire --ttl`, from now on
    #[command(after_long_help = SCRIPT_EXAMPLES)]
    Extend(Extend),
    /// End a hold of `acquire`
    ///
    /// A hold that has ended before is no error: that is reported, with exit code 0.
    #[command(verbatim_doc_comment, after_long_help = SCRIPT_EXAMPLES)]
    Release(Release),
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

const SCRIPT_EXAMPLES: &str = "\
Examples:
  eval \"$(stanchion acquire deploy -w 5m --export)\" || exit   held until the script ends,
  stanchion release                                           or until here
  stanchion acquire deploy --ttl 30m --token-file t           CI: the token in a file, the fence on stdout
  stanchion extend --ttl 30m --token-file t                   30 minutes from now
  stanchion release --token-file t

Exit codes: 75 if the key was not obtained; 76 if `extend` finds that the hold has ended; the
others are those of `stanchion --help`. With --export, `eval` returns the code too.
";

#[derive(Args, Debug)]
pub(crate) struct Acquire {
    /// The key: 1 to 512 bytes of UTF-8
    #[arg(value_name = "KEY")]
    pub(crate) key: String,
    /// Do not wait: give up at once if the key is taken
    #[arg(short, long, conflicts_with = "wait")]
    pub(crate) no_wait: bool,
    /// Wait no longer than this; 0 is one attempt
    #[arg(short, long, value_name = "DUR", value_parser = span_or_zero, allow_hyphen_values = true)]
    pub(crate) wait: Option<Duration>,
    /// Share the key with others that use --shared
    #[arg(short, long, conflicts_with = "permits")]
    pub(crate) shared: bool,
    /// Let this many hold the key at a time; if they differ, the smaller number counts
    #[arg(long, value_name = "N", value_parser = permits, allow_hyphen_values = true)]
    pub(crate) permits: Option<u32>,
    /// Hold the key until this process ends; the default is the process that called stanchion
    ///
    /// The default is the shell whose $$ the caller has, also in $(...), a pipeline or a subshell. Say
    /// --pid $$ below programs that wait for their command, such as sudo, timeout and xargs.
    #[arg(verbatim_doc_comment, long, value_name = "PID", value_parser = pid, allow_hyphen_values = true)]
    #[arg(conflicts_with = "ttl")]
    pub(crate) pid: Option<i32>,
    /// Hold the key for this time, whatever becomes of any process
    ///
    /// Another can have the key a little later: after a quarter of this time more, at most 5 seconds.
    #[arg(verbatim_doc_comment, long, value_name = "DUR", value_parser = span, allow_hyphen_values = true)]
    pub(crate) ttl: Option<Duration>,
    /// A text that `ls` and `inspect` show with this hold, up to 4 KiB
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) metadata: Option<String>,
    /// Write the token into this file, for its owner alone, and do not print it
    #[arg(long, value_name = "PATH")]
    pub(crate) token_file: Option<PathBuf>,
    /// Print a line for `eval` that sets STANCHION_KEY, STANCHION_TOKEN and STANCHION_FENCE
    #[arg(long, conflicts_with = "json")]
    pub(crate) export: bool,
    /// Print one JSON object: key, token, fence, pid, ttl_ms
    #[arg(long)]
    pub(crate) json: bool,
}

/// The hold of `extend` and `release`.
#[derive(Args, Debug)]
pub(crate) struct TokenSource {
    /// The token that `acquire` printed; the default is STANCHION_TOKEN
    ///
    /// Every user of the machine can read the arguments of a program: STANCHION_TOKEN and
    /// --token-file are safer.
    #[arg(verbatim_doc_comment, value_name = "TOKEN")]
    pub(crate) token: Option<Secret>,
    /// A file whose first line is the token
    #[arg(long, value_name = "PATH", conflicts_with = "token")]
    pub(crate) token_file: Option<PathBuf>,
}

/// A text that `Debug` does not show.
#[derive(Clone)]
pub(crate) struct Secret(String);

impl Secret {
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

#[derive(Args, Debug)]
pub(crate) struct Extend {
    #[command(flatten)]
    pub(crate) hold: TokenSource,
    /// The time left from now on; it may be shorter than before
    #[arg(long, value_name = "DUR", value_parser = span, allow_hyphen_values = true)]
    pub(crate) ttl: Duration,
    /// Print one JSON object: key, ttl_ms
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Release {
    #[command(flatten)]
    pub(crate) hold: TokenSource,
    /// Keep the key closed for this long
    #[arg(long, value_name = "DUR", value_parser = span, allow_hyphen_values = true)]
    pub(crate) cooldown: Option<Duration>,
    /// Print one JSON object: key, released (whether the token still held the key)
    #[arg(long)]
    pub(crate) json: bool,
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
