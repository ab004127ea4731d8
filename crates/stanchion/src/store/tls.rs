//! Explains why an encrypted connection to a server failed.

/// Texts of TLS faults, and what would be right.
const ADVICE: [(&str, &str); 7] = [
    ("InvalidContentType", "the server does not speak TLS on this port: name its TLS port, or use a URL without TLS"),
    (
        "UnknownIssuer",
        "no authority that this machine trusts issued the server's certificate: name the issuer's certificate, or the \
         certificate itself if it is self-signed, with `ca_file`",
    ),
    (
        "CaUsedAsEndEntity",
        "the server's certificate is that of an authority, as `openssl req -x509` makes it: make one with `-addext \
         basicConstraints=critical,CA:FALSE`, and name it with `ca_file`",
    ),
    ("not valid for", "use a host name that is in the server's certificate"),
    ("NotValidForName", "use a host name that is in the server's certificate"),
    ("xpired", "renew the server's certificate"),
    ("invalid peer certificate", "name the certificate of the server's authority with `ca_file`"),
];

/// Returns what would be right after this fault of TLS, with `; ` before it, or nothing.
pub(super) fn advice(fault: &str) -> String {
    let found = ADVICE.iter().find(|(mark, _)| fault.contains(mark));
    found.map(|(_, advice)| format!("; {advice}")).unwrap_or_default()
}
