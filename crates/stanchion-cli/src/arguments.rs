//! The command line: the one definition from which parsing, help, completions and man pages come.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand};
use stanchion::{Demand, MAX_OWNER_BYTES};

use crate::child::OnLost;
use crate::duration::{span, span_or_zero};
use crate::{exit_code, help};

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

fn pid(text: &str) -> Result<i32, String> {
    whole(text, 1, i32::MAX as u64)
}

fn slot(text: &str) -> Result<u64, String> {
    whole(text, 0, u64::MAX)
}

fn code(text: &str) -> Result<u8, String> {
    whole(text, 0, u8::MAX.into())
}

fn owner(text: &str) -> Result<String, String> {
    match text.len() {
        1..=MAX_OWNER_BYTES => Ok(text.to_owned()),
        length => Err(format!("a label has 1 to {MAX_OWNER_BYTES} bytes, this one has {length}")),
    }
}

/// Usage of the commands that run something: clap's own would not say where the command may stand.
macro_rules! usage {
    ($name:literal) => {
        concat!(
            "stanchion ",
            $name,
            " [OPTIONS] KEY [--] CMD [ARG]...\n       stanchion ",
            $name,
            " [OPTIONS] KEY -c STRING"
        )
    };
}

/// Run one command at a time, across processes and machines.
///
/// `stanchion run KEY -- CMD` runs CMD while it holds KEY. Other runs with the same KEY wait, first
/// come, first served. With no store given it works between the processes of one user on one
/// machine, without any server.
#[derive(Debug, Parser)]
#[command(name = "stanchion", version, after_long_help = help::after_options("stanchion"), verbatim_doc_comment)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Args, Debug)]
pub(crate) struct Common {
    /// The store: sqlite:/FOLDER, or the URL of a server, without a password in it
    #[arg(long, global = true, value_name = "URL", conflicts_with = "store_file", display_order = 100)]
    pub(crate) store: Option<String>,
    /// A file whose first line is the URL of the store
    #[arg(long, global = true, value_name = "PATH", display_order = 101)]
    pub(crate) store_file: Option<PathBuf>,
    /// The namespace of the keys: keys of different namespaces have nothing to do with each other
    #[arg(long, global = true, value_name = "NAME", allow_hyphen_values = true, display_order = 102)]
    pub(crate) namespace: Option<String>,
    /// Print nothing: the exit code tells the result
    #[arg(short, long, global = true, conflicts_with = "verbose", display_order = 103)]
    pub(crate) quiet: bool,
    /// Also report progress: the store, who holds the key, the wait and the release
    #[arg(short, long, global = true, display_order = 104)]
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
    ///
    /// Options stand before CMD; everything after CMD belongs to CMD. With several --key, CMD starts when
    /// all of them are held, and all are free when it has ended. Runs that name the same keys in different
    /// orders do not block each other for ever.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("run"))]
    #[command(override_usage = concat!(usage!("run"), "\n       stanchion run [OPTIONS] --key KEY [--key KEY]... -- CMD [ARG]..."))]
    Run(Run),
    /// Run a command at most once per period: the guard for cron
    ///
    /// Runs CMD, unless another process runs it now or it was done for this period or slot. Then it does
    /// nothing and ends with exit code 0, in silence unless it writes to a terminal. A command that fails
    /// does not count, so that the next machine can try. `inspect KEY` shows the last run.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("once"), override_usage = usage!("once"))]
    Once(Once),
    /// Run a command while this process leads, again after each election
    ///
    /// Candidates for KEY queue, and one of them leads: it runs CMD. If the leader loses the key, CMD is
    /// ended as `run` ends it, before another candidate can lead; then this process queues again, and runs
    /// CMD again when it is elected. An outage of the store ends no candidate that has led before.
    ///
    /// When CMD ends by itself, the leader resigns, and stanchion ends with CMD's exit code: a service
    /// manager decides whether to start it again. TERM and INT are passed on to CMD. STANCHION_FENCE is the
    /// number of the term.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("elect"), override_usage = usage!("elect"))]
    Elect(Elect),
    /// Wait until a key is free, without taking it
    ///
    /// Free means that nobody holds KEY or waits for it, and that no cooldown keeps it closed. stanchion
    /// looks at the key, at first often and then once a second: it has no place in the queue, takes no fence
    /// and delays nobody. A key that is free for a moment between two holders is not noticed, and it may
    /// be taken again when stanchion ends. To have the key, use `run`.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("wait"))]
    Wait(Wait),
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
    #[command(verbatim_doc_comment, after_long_help = help::after_options("acquire"))]
    Acquire(Acquire),
    /// Set the time left of a hold of `acquire --ttl`, from now on
    #[command(after_long_help = help::after_options("extend"))]
    Extend(Extend),
    /// End a hold of `acquire`
    ///
    /// A hold that has ended before is no error: that is reported, with exit code 0.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("release"))]
    Release(Release),
    /// List the keys that are held, waited for or closed
    ///
    /// Entries that cannot be read are named on stderr and skipped (exit 65). At a terminal long keys are shortened
    /// in the middle; in a pipe they are not.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("ls"))]
    Ls(Ls),
    /// Show one key: holders, queue, fences, the last run
    #[command(after_long_help = help::after_options("inspect"))]
    Inspect(Inspect),
    /// Print a line for every change
    ///
    /// Looks at the keys once per --interval and prints the differences; a hold that begins and ends
    /// between two looks is not seen. The first look prints all holds. While the store is away, it keeps
    /// looking, and prints what has changed once the store is back.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("watch"))]
    Watch(Watch),
    /// End the hold of another process
    ///
    /// Ends the hold that has this fence, and no other: if the key has changed hands since you looked,
    /// nothing happens (exit code 1). A `stanchion run` that loses its key this way kills its command at
    /// once, because the next command may start. At a terminal it shows the holds and asks for what is missing.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("force-release"))]
    #[command(name = "force-release", visible_alias = "break")]
    ForceRelease(ForceRelease),
    /// Show keys, holders and queues on a full screen
    ///
    /// Looks at the keys once a second, because a store notifies holders and waiters only: a hold that
    /// begins and ends between two looks is not seen. Keys with the most waiters come first, then the
    /// oldest. Up and down select a hold, f ends it by force after a reason and a confirmation, q quits.
    /// An outage of the store is reported, and top goes on.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("top"))]
    Top(Top),
    /// Check the store: can it be reached, used and trusted
    ///
    /// Prints a line per check: ok, warning, failed or skipped. Holds a key of its own for a moment, and
    /// creates no store. The exit code is that of the first check that failed: 69 the store cannot be
    /// reached, 77 a right is missing, 78 it is misconfigured.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("doctor"))]
    Doctor(Doctor),
    /// Measure the store
    ///
    /// Measures an acquire, a release and a hand-off with one task and with several tasks of one process.
    /// Uses keys of its own, and holds none of them afterwards. Puts load on the store while it runs.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("bench"))]
    Bench(Bench),
    /// Print or run the SQL that creates the schema of a PostgreSQL store
    ///
    /// The role that runs it needs the right to create and becomes the schema's owner; roles that use
    /// the locks do not need it. Running it again changes nothing.
    #[command(verbatim_doc_comment, after_long_help = help::after_options("schema"))]
    Schema {
        /// Run it instead of printing it
        #[arg(long)]
        apply: bool,
    },
    /// Print the completions for a shell
    #[command(after_long_help = help::after_options("completions"))]
    Completions {
        /// The shell
        #[arg(value_name = "SHELL")]
        shell: clap_complete::Shell,
    },
    /// Print the man page, or write all of them into a folder
    #[command(after_long_help = help::after_options("man"))]
    Man {
        /// Where to write stanchion.1, stanchion-run.1 and so on
        #[arg(value_name = "DIR")]
        folder: Option<PathBuf>,
    },
}

/// The limit of a wait.
#[derive(Args, Debug)]
pub(crate) struct Limit {
    /// Do not wait: give up at once if the key is taken
    ///
    /// A store that does not answer within about a second is unavailable (exit 69). For a store
    /// that is slower than that, use --wait.
    #[arg(verbatim_doc_comment, short, long, aliases = ["nonblock", "nb"], conflicts_with = "wait")]
    no_wait: bool,
    /// Wait no longer than this; 0 is one attempt
    ///
    /// The limit covers opening the store too. While the store is away, stanchion keeps trying
    /// until the limit (exit 69 then). Without a limit it gives up after 10 seconds if the store is
    /// away at the start, and waits through any outage once it is in the queue.
    #[arg(verbatim_doc_comment, short, long, alias = "timeout", value_name = "DUR", value_parser = span_or_zero)]
    #[arg(allow_hyphen_values = true)]
    wait: Option<Duration>,
    /// The exit code if the key was not obtained
    #[arg(short = 'E', long, alias = "conflict-exit-code", value_name = "N", value_parser = code)]
    #[arg(allow_hyphen_values = true, default_value_t = exit_code::NOT_OBTAINED)]
    pub(crate) busy_exit_code: u8,
}

impl Limit {
    /// Maximum wait: `None` for no limit, zero for one attempt.
    pub(crate) fn span(&self) -> Option<Duration> {
        if self.no_wait { Some(Duration::ZERO) } else { self.wait }
    }
}

#[derive(Args, Debug)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) limit: Limit,
    /// Share the key with other runs that use --shared
    ///
    /// A run with --permits N counts each --shared run as one of its N.
    #[arg(short, long, conflicts_with = "permits")]
    pub(crate) shared: bool,
    /// Hold the key alone: the default
    #[arg(short = 'x', long, hide_short_help = true, conflicts_with_all = ["permits", "shared"])]
    pub(crate) exclusive: bool,
    /// Let this many hold the key at a time; if the runs differ, the smaller number counts
    #[arg(long, value_name = "N", value_parser = permits, allow_hyphen_values = true)]
    pub(crate) permits: Option<u32>,
    /// Keep the key closed for this long after the command has ended
    #[arg(long, value_name = "DUR", value_parser = span, allow_hyphen_values = true)]
    pub(crate) cooldown: Option<Duration>,
    #[command(flatten)]
    pub(crate) child: Child,
}

#[derive(Args, Debug)]
#[command(mut_arg("command", |command| command.required_unless_present("forget")))]
pub(crate) struct Once {
    /// The period: not again until nine tenths of it have passed since the last run began
    ///
    /// The last tenth is for clocks that differ and a cron that is late. A run that fails does not
    /// count, nor one whose machine dies.
    #[arg(verbatim_doc_comment, long, value_name = "DUR", value_parser = span, allow_hyphen_values = true)]
    #[arg(required_unless_present_any = ["slot", "forget"])]
    pub(crate) every: Option<Duration>,
    /// A number that rises with the schedule: not if it, or a later one, was done
    ///
    /// $(date +%Y%m%d) is one for each day.
    #[arg(verbatim_doc_comment, long, value_name = "N", value_parser = slot, allow_hyphen_values = true)]
    pub(crate) slot: Option<u64>,
    /// Run it although it was done for this period or slot; but not while another process runs it
    #[arg(long)]
    pub(crate) force: bool,
    /// Delete the record of the last run and run nothing: the next `once` runs the command
    #[arg(long, conflicts_with_all = ["command", "every", "force", "shell", "slot"])]
    pub(crate) forget: bool,
    /// The exit code if it is not run
    #[arg(short = 'E', long, alias = "conflict-exit-code", value_name = "N", value_parser = code, allow_hyphen_values = true)]
    #[arg(default_value_t = exit_code::OK)]
    pub(crate) busy_exit_code: u8,
    #[command(flatten)]
    pub(crate) child: Child,
}

#[derive(Args, Debug)]
pub(crate) struct Elect {
    /// A file that exists while CMD runs as the leader, for readiness checks
    ///
    /// It appears whole, after CMD has started, and holds the number of the term. It is removed when the
    /// key is lost, before CMD is ended, and when CMD has ended. A file that a killed stanchion left behind
    /// is removed at the next start, so each candidate needs a PATH of its own.
    #[arg(verbatim_doc_comment, long, value_name = "PATH")]
    pub(crate) ready_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) child: Child,
}

#[derive(Args, Debug)]
pub(crate) struct Wait {
    /// The key
    #[arg(value_name = "KEY")]
    pub(crate) key: String,
    #[command(flatten)]
    pub(crate) limit: Limit,
}

/// The key and the command of `run`, `once` and `elect`, and their common options.
#[derive(Args, Debug)]
pub(crate) struct Child {
    /// The key: 1 to 512 bytes of UTF-8
    #[arg(value_name = "KEY", required_unless_present = "keys")]
    key: Option<String>,
    /// The key, also one that begins with `-`; `run` takes several: all or nothing. CMD comes after `--`
    #[arg(long = "key", value_name = "KEY", allow_hyphen_values = true)]
    pub(crate) keys: Vec<String>,
    /// How long the store keeps the key after this machine has fallen silent (default 10s)
    ///
    /// A server frees the keys of a program that it has not heard of for this long. The embedded store
    /// needs no such limit: it knows at once when a program has died.
    #[arg(verbatim_doc_comment, long, value_name = "DUR", value_parser = span, allow_hyphen_values = true)]
    pub(crate) ttl: Option<Duration>,
    /// Hold the key for this long at most; then it is lost
    #[arg(long, value_name = "DUR", value_parser = span, allow_hyphen_values = true)]
    pub(crate) max_hold: Option<Duration>,
    /// The fate of the command when the key is lost
    #[arg(long, value_enum, value_name = "ACTION", default_value_t = OnLost::Term)]
    pub(crate) on_lost: OnLost,
    /// Time between SIGTERM and SIGKILL when the key is lost
    ///
    /// It is cut short where another could have the key before.
    #[arg(long, value_name = "DUR", value_parser = span_or_zero, default_value = "5s", allow_hyphen_values = true)]
    #[arg(hide_short_help = true)]
    pub(crate) kill_after: Duration,
    /// A text that `ls` and `inspect` show with this hold, up to 4 KiB
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, hide_short_help = true)]
    pub(crate) metadata: Option<String>,
    /// The label of this process in `ls` and `inspect` (default: PROGRAM@HOST/PID)
    #[arg(long, value_name = "LABEL", value_parser = owner, allow_hyphen_values = true, hide_short_help = true)]
    pub(crate) owner: Option<String>,
    /// Run this text in a shell (sh -c) instead of a command
    #[arg(short = 'c', long, alias = "command", value_name = "STRING", conflicts_with = "command")]
    #[arg(allow_hyphen_values = true)]
    pub(crate) shell: Option<OsString>,
    /// The command and its arguments, as they are: no shell reads them
    #[arg(value_name = "CMD", trailing_var_arg = true, required_unless_present_any = ["shell", "keys"])]
    pub(crate) command: Vec<OsString>,
}

impl Child {
    /// Sorts the words into keys and command. clap takes the first word for the KEY; with `--key` it is the program, and comes
    /// directly after `--`: otherwise the options of the program would have been taken for ours.
    fn sort_words(&mut self, given: &[OsString], needs_command: bool) -> Result<(), clap::Error> {
        let error = |kind, text: &str| Err(clap::Error::raw(kind, format!("{text}\n")));
        match self.key.take() {
            Some(key) if self.keys.is_empty() => self.keys.push(key),
            Some(program) => {
                let before = given.iter().rev().nth(self.command.len() + 1);
                if before.is_none_or(|word| word != "--") {
                    return error(ErrorKind::ArgumentConflict, "with --key the command to run comes after `--`");
                }
                self.command.insert(0, program.into());
            }
            None => {}
        }
        match (&self.shell, self.command.is_empty()) {
            (Some(_), false) => error(ErrorKind::ArgumentConflict, "-c and a command cannot be used together"),
            (None, true) if needs_command => error(ErrorKind::MissingRequiredArgument, "the command to run is missing"),
            _ => Ok(()),
        }
    }
}

impl Arguments {
    /// Parses the words of the command line, without the program's own name.
    pub(crate) fn of(given: Vec<OsString>) -> Result<Self, clap::Error> {
        let mut arguments = Self::try_parse_from(std::iter::once("stanchion".into()).chain(given.iter().cloned()))?;
        match &mut arguments.command {
            Command::Run(Run { child, .. }) | Command::Elect(Elect { child, .. }) => child.sort_words(&given, true)?,
            Command::Once(Once { child, forget, .. }) => child.sort_words(&given, !*forget)?,
            _ => {}
        }
        Ok(arguments)
    }
}

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
    /// List the last runs that `once` recorded, instead of the keys in use
    #[arg(long)]
    pub(crate) runs: bool,
    /// One JSON object per key and line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// The key
    #[arg(value_name = "KEY")]
    pub(crate) key: String,
    /// Print nothing: exit 0 if a request for the key would be granted now, 75 if not
    ///
    /// The request is one of `stanchion run KEY`. Decide nothing by it: a moment later another process
    /// may have the key. To run something if the key is free, use `stanchion run --no-wait`.
    #[arg(verbatim_doc_comment, long, conflicts_with = "json")]
    pub(crate) check: bool,
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
    /// The fence of the hold to end, as `ls` and `inspect` show it; without it you are asked
    #[arg(long, value_name = "F", value_parser = fence, allow_hyphen_values = true)]
    pub(crate) fence: Option<u64>,
    /// The reason, shown to the user whose command loses the key; without it you are asked
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) reason: Option<String>,
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
    fn arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    /// Returns the keys, the command and whether `-n` was given.
    fn parsed(line: &str) -> Result<(Vec<String>, Vec<OsString>, bool), clap::Error> {
        let arguments = Arguments::of(line.split(' ').map(OsString::from).collect())?;
        let Command::Run(Run { limit, child, .. }) = arguments.command else { panic!("not run") };
        Ok((child.keys, child.command, limit.no_wait))
    }

    #[test]
    fn words_after_the_command_belong_to_it() {
        let table: [(&str, &[&str], &[&str], bool); 9] = [
            ("run k -n -- ls -n --json", &["k"], &["ls", "-n", "--json"], true),
            ("run k ls -n --json", &["k"], &["ls", "-n", "--json"], false),
            ("run -n k ls -n", &["k"], &["ls", "-n"], true),
            ("run k --nb ls -- -q", &["k"], &["ls", "--", "-q"], true),
            ("run k -- ls -- -n", &["k"], &["ls", "--", "-n"], false),
            ("run -- -k ls -n", &["-k"], &["ls", "-n"], false),
            ("run --key a --key -b -- ls -n", &["a", "-b"], &["ls", "-n"], false),
            ("run --key a -n -- ls", &["a"], &["ls"], true),
            ("run --key a -- ls -- x", &["a"], &["ls", "--", "x"], false),
        ];
        for (line, keys, command, no_wait) in table {
            let expected =
                (keys.iter().map(ToString::to_string).collect(), command.iter().map(OsString::from).collect());
            let (keys, command, is_no_wait) = parsed(line).unwrap_or_else(|error| panic!("{line}: {error}"));
            assert_eq!(((keys, command), is_no_wait), (expected, no_wait), "{line}");
        }
        for line in [
            "run --key a ls",
            "run --key a ls -n",
            "run --key a ls -- x",
            "run --key a",
            "run k",
            "run k --",
            "run --key a -c x -- ls",
            "run k -c x ls",
            "run k -z ls",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }
}
