//! Opens the database: checks its content, creates the tables, and removes all holds of an earlier boot.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, TransactionBehavior, params};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, openat};
use rustix::io::Errno;

use super::error::{error, from_sqlite, from_system, misconfigured};
use super::folder::{Folder, SharedFiles, check_file, open_plain_file, was_deleted, with_ending};
use super::session;
use crate::clock::Clock;
use crate::error::{ErrorKind, Result};
use crate::token::SessionId;

/// Application id of the database file: "stan" in ASCII.
const APPLICATION_ID: i32 = 0x7374_616e;
/// Version of the tables.
const VERSION: i32 = 2;

/// Amount by which all fences rise after a restart of the machine, in microseconds of the clock that fences follow.
/// With `synchronous=NORMAL` a power failure may undo the last commits, and the fences that the store minted in them
/// must not come back.
const FENCE_STEP_AT_BOOT: i64 = 600_000_000;
/// Maximum number of session files without a session that the store leaves in place. A process that is killed while it
/// opens its session leaves two.
const MAX_ORPHAN_FILES: usize = 16;
/// Maximum time that a process waits, before it creates a new database, for the processes that still use the deleted
/// one. They check their files five times per session ttl, which is 10 s by default.
const MAX_SURVIVOR_WAIT: Duration = Duration::from_secs(5);
/// Maximum remaining time of a cooldown, in microseconds.
const MAX_COOLDOWN: i64 = 30 * 24 * 3600 * 1_000_000;

/// An open database, with its gate and the identity of its files.
#[derive(Debug)]
pub(super) struct OpenDatabase {
    pub(super) db: Connection,
    pub(super) gate: Gate,
    pub(super) files: SharedFiles,
}

/// The file whose kernel lock queues the writers of all processes. SQLite's own busy handler has no queue and starves
/// writers.
#[derive(Debug)]
pub(super) struct Gate(OwnedFd);

impl Gate {
    /// Leaves the gate, if this process has its lock.
    pub(super) fn leave(&self) {
        let _ = flock(&self.0, FlockOperation::Unlock); // unlocking an open file cannot fail
    }

    /// Takes the lock of the gate if no process has it. Returns `None` otherwise, or after a fault.
    pub(super) fn try_enter(&self) -> Option<GateGuard<'_>> {
        flock(&self.0, FlockOperation::NonBlockingLockExclusive).is_ok().then_some(GateGuard(self))
    }

    /// Waits until this process has the lock of the gate.
    pub(super) fn enter(&self, folder: &Folder) -> Result<GateGuard<'_>> {
        loop {
            match flock(&self.0, FlockOperation::LockExclusive) {
                Ok(()) => return Ok(GateGuard(self)),
                Err(Errno::INTR) => {}
                Err(cause) => return Err(from_system("waiting for the gate", &folder.gate, cause)),
            }
        }
    }
}

/// Keeps the lock of the gate until it is dropped.
#[derive(Debug)]
pub(super) struct GateGuard<'a>(&'a Gate);

impl Drop for GateGuard<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Opens the database of the folder, and creates it if it does not exist.
pub(super) fn connect(folder: &Folder, clock: &Clock, boot_id: &str) -> Result<OpenDatabase> {
    let gate = Gate(open_plain_file(&folder.gate)?);
    let path = &folder.database;
    let failed = |cause| from_sqlite("opening the store", path, cause);
    // The gate ensures that only one process creates the tables, and that no process opens the database while its last
    // user closes it.
    let entered = enter_after_survivors(&gate, folder)?;
    create_file(path)?;
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_NOFOLLOW;
    let mut db = Connection::open_with_flags(path, flags).map_err(failed)?;
    db.busy_timeout(Duration::from_secs(5)).map_err(failed)?;
    db.set_prepared_statement_cache_capacity(128);
    // Without this setting SQLite parses and plans a cached statement again for each set of values if a value could
    // change the plan.
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true).map_err(failed)?;
    let is_new = check_content(&db, path)?;
    // The rows are small, and with small pages each commit copies and checksums less.
    db.pragma_update(None, "page_size", 1024).map_err(failed)?;
    let mode =
        db.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0)).map_err(failed)?;
    if mode != "wal" {
        return Err(misconfigured(format!(
            "{} cannot have a write-ahead log (its journal mode is `{mode}`), because the file system cannot share \
             memory; choose a folder on a local disk",
            path.display()
        )));
    }
    db.execute_batch(
        "PRAGMA synchronous = NORMAL; PRAGMA wal_autocheckpoint = 0; PRAGMA temp_store = MEMORY;
         PRAGMA trusted_schema = OFF;",
    )
    .map_err(failed)?;
    let transaction = db.transaction_with_behavior(TransactionBehavior::Immediate).map_err(failed)?;
    if is_new {
        transaction.execute_batch(include_str!("schema.sql")).map_err(failed)?;
        transaction.execute("INSERT INTO meta VALUES (1, ?1, 0, 0)", [boot_id]).map_err(failed)?;
        transaction.pragma_update(None, "application_id", APPLICATION_ID).map_err(failed)?;
        transaction.pragma_update(None, "user_version", VERSION).map_err(failed)?;
    } else {
        remove_earlier_boot(&transaction, clock, boot_id).map_err(failed)?;
    }
    transaction.commit().map_err(failed)?;
    let sessions = db.query_row("SELECT count(*) FROM sessions", [], |row| row.get::<_, i64>(0)).map_err(failed)?;
    if session::count_files(folder) > 2 * usize::try_from(sessions).unwrap_or(0) + MAX_ORPHAN_FILES {
        session::remove_orphans(folder, |session: SessionId| {
            let sql = "SELECT count(*) FROM sessions WHERE id = ?1";
            db.query_row(sql, [session.as_bytes()], |row| row.get(0)).map_err(failed)
        })?;
    }
    let files = SharedFiles::of(folder)?;
    files.touch();
    drop(entered);
    Ok(OpenDatabase { db, gate, files })
}

/// Waits for the gate and, if files of the database were deleted, until the sessions of the old database have ended.
///
/// A process relies on its holds until the next renewal of its session detects the loss.
fn enter_after_survivors<'a>(gate: &'a Gate, folder: &Folder) -> Result<GateGuard<'a>> {
    let clock = Clock::system();
    let until = clock.now().after(MAX_SURVIVOR_WAIT);
    let is_there = |ending| fs::symlink_metadata(with_ending(&folder.database, ending)).is_ok();
    loop {
        let entered = gate.enter(folder)?;
        // SQLite removes the log after its index, so an index without a log means that another program deleted the log.
        let is_orphan_index = is_there("-shm") && !is_there("-wal");
        if is_there("") && !is_orphan_index {
            return Ok(entered);
        }
        if !session::any_is_alive(folder)? {
            // Leftovers of the old database do not belong to the new one, and SQLite fails if it finds them.
            for ending in if is_there("") { &["-shm"][..] } else { &["-wal", "-shm"] } {
                let _ = fs::remove_file(with_ending(&folder.database, ending)); // the file may not exist
            }
            return Ok(entered);
        }
        drop(entered);
        if clock.now() >= until {
            let message = format!("{}, and a process still holds locks in it", was_deleted(&folder.database));
            return Err(error(ErrorKind::Unavailable, message));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Returns an id that changes with each boot of the machine.
#[cfg(target_os = "linux")]
pub(super) fn boot_id() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(|cause| from_system("reading the boot id", path, cause))?;
    Ok(text.trim().to_owned())
}

/// Returns an id that changes with each boot of the machine.
#[cfg(not(target_os = "linux"))]
pub(super) fn boot_id() -> Result<String> {
    let unknown = || error(ErrorKind::Unsupported, "this system has no boot id; use another store");
    let output = std::process::Command::new("/usr/sbin/sysctl").args(["-n", "kern.bootsessionuuid"]).output();
    let text = output.ok().and_then(|output| String::from_utf8(output.stdout).ok()).ok_or_else(unknown)?;
    let text = text.trim();
    if text.is_empty() { Err(unknown()) } else { Ok(text.to_owned()) }
}

/// Creates the database file, with access for its owner only, before SQLite does.
///
/// Never opens an existing file: closing it would release the locks that SQLite has on it for another handle of this
/// process.
fn create_file(path: &Path) -> Result<()> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(CWD, path, flags, Mode::RUSR | Mode::WUSR) {
        Ok(_) | Err(Errno::EXIST) => {}
        Err(cause) => return Err(from_system("creating the database", path, cause)),
    }
    for ending in ["", "-wal", "-shm"] {
        let path = with_ending(path, ending);
        match fs::symlink_metadata(&path) {
            Ok(state) => check_file(&path, &state)?,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
            Err(cause) => return Err(from_system("checking the database", &path, cause)),
        }
    }
    Ok(())
}

/// Returns whether the database is empty, and rejects the database of another program or version. Changes nothing.
fn check_content(db: &Connection, path: &Path) -> Result<bool> {
    let number = |sql: &str| {
        db.query_row(sql, [], |row| row.get::<_, i32>(0)).map_err(|cause| from_sqlite("opening the store", path, cause))
    };
    let tables = number("SELECT count(*) FROM sqlite_schema")?;
    let shown = path.display();
    match (number("PRAGMA application_id")?, number("PRAGMA user_version")?) {
        (0, 0) if tables == 0 => Ok(true),
        (APPLICATION_ID, VERSION) => Ok(false),
        (APPLICATION_ID, version) if version > VERSION => Err(misconfigured(format!(
            "{shown} was created by a newer stanchion (version {version} of the tables, this program supports \
             {VERSION}); update this program, or give it its own folder"
        ))),
        (APPLICATION_ID, version) => Err(misconfigured(format!(
            "{shown} has version {version} of the tables, which this program does not support (it supports \
             {VERSION}); move its folder away while no process uses it"
        ))),
        _ => Err(misconfigured(format!("{shown} belongs to another program; choose another folder"))),
    }
}

/// Removes everything except cooldowns if the database is from an earlier boot: all processes of that boot are gone,
/// and times of its boot-time clock mean nothing now.
fn remove_earlier_boot(db: &Connection, clock: &Clock, boot_id: &str) -> rusqlite::Result<()> {
    if db.query_row("SELECT boot_id = ?1 FROM meta", [boot_id], |row| row.get(0))? {
        return Ok(());
    }
    let now = i64::try_from(clock.now().as_nanos() / 1_000).unwrap_or(i64::MAX);
    let wall = i64::try_from(clock.wall_micros()).unwrap_or(i64::MAX);
    db.execute_batch("DELETE FROM holds; DELETE FROM waiters; DELETE FROM forced; DELETE FROM sessions")?;
    db.execute(
        "UPDATE meta SET boot_id = ?1, fence_floor = ?2 +
             min(9223372036854775807 - ?2, max(fence_floor, (SELECT ifnull(max(fence), 0) FROM keys)))",
        params![boot_id, FENCE_STEP_AT_BOOT],
    )?;
    // Keys with a running cooldown keep their row. All other rows go, and the fences of those keys continue from the
    // floor.
    db.execute("DELETE FROM keys WHERE closed_until_wall IS NULL OR closed_until_wall <= ?1", [wall])?;
    db.execute(
        "UPDATE keys SET fence = (SELECT fence_floor FROM meta), used = 0, holders = 0, waiting = 0,
             next_deadline = NULL, touched = ?1, closed_until = ?1 + min(closed_until_wall - ?2, ?3)",
        params![now, wall, MAX_COOLDOWN],
    )?;
    // The wall clock may have stepped, so compute the wall-clock end of each cooldown again.
    db.execute("UPDATE keys SET closed_until_wall = ?2 + (closed_until - ?1)", params![now, wall])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::clock::VirtualClock;

    fn open(path: &Path, boot_id: &str) -> Result<OpenDatabase> {
        connect(&Folder::prepare(path)?, &VirtualClock::new().clock(), boot_id)
    }

    fn rejected(path: &Path) -> String {
        let before = fs::read(path.join("locks.db")).unwrap();
        let error = open(path, "boot").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured, "{error}");
        assert_eq!(fs::read(path.join("locks.db")).unwrap(), before, "a rejected file is not changed");
        assert!(error.to_string().contains("locks.db"), "{error}");
        error.to_string()
    }

    #[test]
    fn files_are_private_to_their_owner() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("locks");
        let opened = open(&path, "boot").unwrap();
        for name in ["locks.db", "locks.db-wal", "locks.db-shm", "gate"] {
            assert_eq!(fs::metadata(path.join(name)).unwrap().mode() & 0o7777, 0o600, "{name}");
        }
        drop(opened);
        open(&path, "boot").unwrap();
    }

    #[test]
    fn foreign_files_are_rejected_and_unchanged() {
        let temp = tempfile::tempdir().unwrap();
        let fresh = |name: &str| {
            let path = temp.path().join(name);
            Folder::prepare(&path).unwrap();
            (path.clone(), path.join("locks.db"))
        };
        let (folder, file) = fresh("foreign");
        create_file(&file).unwrap();
        Connection::open(&file).unwrap().execute_batch("CREATE TABLE t (x)").unwrap();
        assert!(rejected(&folder).contains("another program"));

        let (folder, file) = fresh("newer");
        drop(open(&folder, "boot").unwrap());
        Connection::open(&file).unwrap().pragma_update(None, "user_version", VERSION + 1).unwrap();
        assert!(rejected(&folder).contains("newer stanchion"));

        let (folder, file) = fresh("older");
        drop(open(&folder, "boot").unwrap());
        Connection::open(&file).unwrap().pragma_update(None, "user_version", VERSION - 1).unwrap();
        assert!(rejected(&folder).contains("does not support"));

        let (folder, file) = fresh("text");
        create_file(&file).unwrap();
        fs::write(&file, "no database at all, but long enough to have a header: ".repeat(20)).unwrap();
        assert!(rejected(&folder).contains("not a database"));

        let (folder, file) = fresh("damaged");
        drop(open(&folder, "boot").unwrap());
        let mut bytes = fs::read(&file).unwrap();
        bytes[100..].fill(0xff);
        fs::write(&file, bytes).unwrap();
        assert!(rejected(&folder).contains("damaged"));

        let (folder, file) = fresh("link");
        std::os::unix::fs::symlink("/dev/null", &file).unwrap();
        assert!(open(&folder, "boot").unwrap_err().to_string().contains("not a plain file"));

        let (folder, _) = fresh("gate");
        std::os::unix::fs::symlink("elsewhere", folder.join("gate")).unwrap();
        let error = open(&folder, "boot").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured);
        assert!(error.to_string().contains("symbolic link"), "{error}");
    }

    #[test]
    fn machine_has_a_boot_id() {
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
        assert!(!boot_id().unwrap().is_empty());
    }
}
