//! What somebody may have meant: where a word, a path or an image looks like something else.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// The name among `known` that `word` is likely a misspelling of.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |name: &str| strsim::damerau_levenshtein(word, name);
    let distances = known.into_iter().map(|name| (distance(name), name));
    let (distance, name) = distances.min_by_key(|(distance, _)| *distance)?;
    // Of a short word everything is near.
    (distance <= (word.len().min(name.len()) / 3).clamp(1, 3)).then_some(name)
}

/// The URI that a path may stand for, which does not exist: `host:10809`, `host:export`,
/// `host/export`.
pub fn remote(path: &Path) -> Option<String> {
    let text = path.to_str()?;
    let (host, rest) = text.split_once([':', '/'])?;
    let is_host = |c: char| c.is_ascii_alphanumeric() || "-.".contains(c);
    // It begins with no dot, as ./disk does, and its folder does not exist either.
    let is_named = host.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !is_named || !host.chars().all(is_host) || Path::new(host).exists() {
        return None;
    }
    match (text.as_bytes()[host.len()], rest.split_once('/')) {
        (b':', None) if rest.parse::<u16>().is_ok() => Some(format!("nbd://{text}")),
        (b':', Some((port, _))) if port.parse::<u16>().is_ok() => Some(format!("nbd://{text}")),
        _ if rest.is_empty() => None,
        _ => Some(format!("nbd://{host}/{rest}")),
    }
}

/// A format of disk images, in the names of people and of qemu-nbd, and by what its files begin
/// with.
struct Format {
    name: &'static str,
    qemu: &'static str,
    /// Bytes before the magic.
    offset: usize,
    magic: &'static [u8],
}

const FORMATS: [Format; 8] = [
    Format { name: "qcow", qemu: "qcow", offset: 0, magic: b"QFI\xfb\0\0\0\x01" },
    Format { name: "qcow2", qemu: "qcow2", offset: 0, magic: b"QFI\xfb" },
    Format { name: "VMDK", qemu: "vmdk", offset: 0, magic: b"KDMV" },
    Format { name: "VMDK", qemu: "vmdk", offset: 0, magic: b"COWD" },
    Format { name: "VMDK", qemu: "vmdk", offset: 0, magic: b"# Disk DescriptorFile" },
    Format { name: "VHDX", qemu: "vhdx", offset: 0, magic: b"vhdxfile" },
    Format { name: "VHD", qemu: "vpc", offset: 0, magic: b"conectix" },
    Format { name: "VDI", qemu: "vdi", offset: 64, magic: b"\x7f\x10\xda\xbe" },
];
/// What has to be read to know them.
const HEAD: usize = 128;

/// What to say of an image that is shown as its raw bytes, and has something else in it: a format
/// that another program knows. May block as long as the image is read.
pub fn other_format(path: &Path) -> Option<String> {
    let mut head = [0; HEAD];
    let len = head_of(path, &mut head).ok()?;
    let is = |format: &&Format| {
        let at = format.offset..format.offset + format.magic.len();
        head[..len].get(at) == Some(format.magic)
    };
    let format = FORMATS.iter().find(is)?;
    let Format { name, qemu, .. } = format;
    let path = path.display();
    Some(format!(
        "{path}: shown as it is, in {name} format; for the disk in it: diskfuse [ qemu-nbd -f {qemu} {path} ] \
         MOUNTPOINT"
    ))
}

fn head_of(path: &Path, head: &mut [u8]) -> io::Result<usize> {
    let open = |flags| File::options().read(true).custom_flags(flags).open(path);
    // Looking at it is no use of it. Only its owner may leave the access time alone.
    open(libc::O_NOATIME).or_else(|_| open(0))?.read_at(head, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspellings_are_known_by_their_nearness() {
        let known = ["read-only", "read-ahead", "run", "direct", "daemonize", "json"];
        let nearest = |word| nearest(word, known);
        assert_eq!(nearest("readonly"), Some("read-only"));
        assert_eq!(nearest("deamonize"), Some("daemonize"));
        assert_eq!(nearest("daemonise"), Some("daemonize"));
        assert_eq!(nearest("runs"), Some("run"));
        for other in ["", "x", "bad", "nonsense", "foreground"] {
            assert_eq!(nearest(other), None, "{other}");
        }
    }

    #[test]
    fn what_looks_remote_gets_a_uri() {
        let remote = |text: &str| remote(Path::new(text));
        let uri = |text: &str| Some(format!("nbd://{text}"));
        assert_eq!(remote("storage:10809"), uri("storage:10809"));
        assert_eq!(remote("storage:10809/vm1"), uri("storage:10809/vm1"));
        assert_eq!(remote("storage.example/vm1"), uri("storage.example/vm1"));
        assert_eq!(remote("storage:vm1"), uri("storage/vm1"));
        for path in ["disk.img", "./a/b", "/a/b", "../a", "a b/c", "storage/", "src/nothing", ":1"]
        {
            assert_eq!(remote(path), None, "{path}");
        }
    }

    #[test]
    fn formats_are_known_by_their_magic() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        for format in FORMATS {
            let mut bytes = vec![0; format.offset];
            bytes.extend(format.magic);
            std::fs::write(&image, &bytes).unwrap();
            let said = other_format(&image).unwrap();
            let command = format!("qemu-nbd -f {} {}", format.qemu, image.display());
            assert!(said.contains(&command), "{said}");
            // Too short for it.
            std::fs::write(&image, &bytes[..bytes.len() - 1]).unwrap();
            assert!(!other_format(&image).is_some_and(|said| said.contains(&command)));
        }
        for raw in [&b""[..], &[0; 4096], b"LUKS\xba\xbe"] {
            std::fs::write(&image, raw).unwrap();
            assert_eq!(other_format(&image), None);
        }
    }
}
