"""Takes helm and kubectl out of their wheel: unpack_helm.py WHEEL_DIR BIN_DIR"""

import io
import pathlib
import sys
import tarfile
import zipfile


def main():
    wheels, target = map(pathlib.Path, sys.argv[1:])
    (path,) = wheels.glob("aws_cdk*.whl")
    with zipfile.ZipFile(path) as wheel:
        (package,) = [name for name in wheel.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(wheel.read(package))) as tar:
            layer = tar.extractfile("package/lib/layer.zip").read()
    with zipfile.ZipFile(io.BytesIO(layer)) as files:
        for name in ("helm", "kubectl"):
            new = target / f"{name}.new"
            new.write_bytes(files.read(f"{name}/{name}"))
            new.chmod(0o755)
            new.rename(target / name)


if __name__ == "__main__":
    main()
