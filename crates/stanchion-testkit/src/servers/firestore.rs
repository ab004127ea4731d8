//! The emulator of Firestore, as Google ships it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use super::{Process, free_port, in_path, wait};

/// An emulator.
#[derive(Debug)]
pub struct FirestoreEmulator {
    _process: Process,
    port: u16,
    _folder: tempfile::TempDir,
}

/// Where the emulator's archive is: what `STANCHION_FIRESTORE_EMULATOR` names, or the one of Google's package. It cannot be
/// installed from Debian's archives, so a machine may have none.
pub fn firestore_emulator() -> Option<PathBuf> {
    in_path("java")?;
    if let Some(named) = std::env::var_os("STANCHION_FIRESTORE_EMULATOR") {
        return Some(named.into());
    }
    let name = "cloud-firestore-emulator.jar";
    let listed = Command::new("dpkg").args(["-L", "google-cloud-cli-firestore-emulator"]).output().ok();
    let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let of_package = listed.lines().find(|line| line.ends_with(name)).map(PathBuf::from);
    let usual = Path::new("/usr/lib/google-cloud-sdk/platform/cloud-firestore-emulator").join(name);
    of_package.into_iter().chain([usual]).find(|jar| jar.exists())
}

impl FirestoreEmulator {
    /// One that all tests of this process share; none if this machine has none, which is said loudly.
    pub fn shared() -> Option<&'static Self> {
        static SHARED: OnceLock<Option<FirestoreEmulator>> = OnceLock::new();
        SHARED.get_or_init(|| firestore_emulator().map(|jar| Self::start(&jar))).as_ref()
    }

    /// Starts one.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start(jar: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        // It keeps every version of every document.
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
        // Its first answers take seconds on a busy machine: it is asked for everything once.
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

    /// Its port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The URL of a project of its own: nothing of it is seen from another.
    pub fn url(&self) -> String {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let project = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        format!("firestore://test-{}-{project}?emulator=127.0.0.1:{}", std::process::id(), self.port)
    }
}
