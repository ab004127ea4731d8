//! Starts Google's Firestore emulator.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::{Process, free_port, in_path, wait};

/// A running emulator, which stops when it is dropped.
#[derive(Debug)]
pub struct FirestoreEmulator {
    _process: Process,
    port: u16,
    _folder: tempfile::TempDir,
}

/// Returns the path of the emulator's archive: the value of `STANCHION_FIRESTORE_EMULATOR`, or the archive in Google's
/// package. Debian's archives don't contain the emulator, so a machine may have none.
pub fn firestore_emulator() -> Option<PathBuf> {
    in_path("java")?;
    if let Some(named) = std::env::var_os("STANCHION_FIRESTORE_EMULATOR") {
        return Some(named.into());
    }
    let name = "cloud-firestore-emulator.jar";
    let listed = Command::new("dpkg").args(["-L", "google-cloud-cli-firestore-emulator"]).output().ok();
    let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let from_package = listed.lines().find(|line| line.ends_with(name)).map(PathBuf::from);
    let default = Path::new("/usr/lib/google-cloud-sdk/platform/cloud-firestore-emulator").join(name);
    from_package.into_iter().chain([default]).find(|jar| jar.exists())
}

impl FirestoreEmulator {
    /// Returns the emulator that all tests of this process share, or `None` if this machine has none.
    pub fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<FirestoreEmulator>> = OnceLock::new();
        SHARED.get_or_init(|| firestore_emulator().map(|jar| Self::start(&jar))).as_ref()
    }

    /// Starts an emulator.
    ///
    /// # Panics
    /// Panics if the emulator does not start.
    pub fn start(jar: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        // The emulator keeps every version of every document, so it needs a large heap.
        let arguments = [
            "-Xmx3g",
            "-XX:+UseSerialGC",
            "-XX:TieredStopAtLevel=1",
            "-cp",
            &jar.display().to_string(),
            "com.google.cloud.datastore.emulator.firestore.CloudFirestore",
            "--host=127.0.0.1",
            &format!("--port={port}"),
        ];
        let java = in_path("java").expect("java is missing: the emulator needs it");
        let process = Process::start(&java, &arguments.map(str::to_owned), folder.path());
        let emulator = Self { _process: process, port, _folder: folder };
        // The first responses take seconds on a busy machine, so send each kind of request once.
        wait("the emulator answers", || {
            crate::block_on(async {
                let locks = stanchion::Locks::open(&emulator.url()).await?;
                let _guard = locks.lock("k").await?;
                locks.list("").await?;
                locks.close().await
            })
            .is_ok()
        });
        emulator
    }

    /// Returns the emulator's port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the URL of a new project, which shares no data with other projects.
    pub fn url(&self) -> String {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let project = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        format!("firestore://test-{}-{project}?emulator=127.0.0.1:{}", std::process::id(), self.port)
    }
}
