#!/usr/bin/env bash
# Build kubensage-agent.pyz: the agent with grpcio and protobuf for CPython 3.9 to 3.14 on x86_64 and aarch64.
#   ./build_zipapp.sh             for all of them
#   ./build_zipapp.sh --native    for this machine's python3 alone, a quarter of the size
set -euo pipefail
cd "$(dirname "$0")"

# The wheels, as PyPI names and hashes them (sha256).
WHEELS='
6449455419dac386bfcbe4bd63d817da31b7615a69926cfd46574737cd103b85  grpcio-1.80.1-cp39-cp39-manylinux2014_aarch64.manylinux_2_17_aarch64.whl
c87817d7280b2a648ac817fa7869ce677ce8a7928edf0c2ee60db8c1518fc908  grpcio-1.80.1-cp39-cp39-manylinux2014_x86_64.manylinux_2_17_x86_64.whl
c3a821ff47041944a019fd18982903615cf4a463ed8cdaa72b2105e5245e734c  grpcio-1.80.1-cp310-cp310-manylinux2014_aarch64.manylinux_2_17_aarch64.whl
f0d70bdf3b7ffa1fda1d2921d0fc41e11a9be65bc9f1f21847a24d681520a050  grpcio-1.80.1-cp310-cp310-manylinux2014_x86_64.manylinux_2_17_x86_64.whl
0a98682915a373bafa77c22305abd778009ef2e471819f6c7d50b6dc7aba8e79  grpcio-1.80.1-cp311-cp311-manylinux2014_aarch64.manylinux_2_17_aarch64.whl
a6ea3abddd86c4a4ecb266bcabd276d5f7aa829b410000a959d7e78cc549021d  grpcio-1.80.1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl
1cdf651bf9ef74162176d3bb49fd0f232b9e0979bc40255ff0b4a4cf13c552f0  grpcio-1.80.1-cp312-cp312-manylinux2014_aarch64.manylinux_2_17_aarch64.whl
42ce71d3a516465620fc5662c5a628f3f444141a75c303287fa329604cd4bec3  grpcio-1.80.1-cp312-cp312-manylinux2014_x86_64.manylinux_2_17_x86_64.whl
9f4ecbc1c9673560cd63b750979520a66a9c506f331230a1d78e28fc02a3e948  grpcio-1.80.1-cp313-cp313-manylinux2014_aarch64.manylinux_2_17_aarch64.whl
9b609f6e5b97b539992d149c3c144c27088f70aa37d6aefffbb45def9b5af93e  grpcio-1.80.1-cp313-cp313-manylinux2014_x86_64.manylinux_2_17_x86_64.whl
921ccb0ac3878c5d052c4b364f196fe51a79b8a1e8f8e9585275bbbef2518942  grpcio-1.80.1-cp314-cp314-manylinux2014_aarch64.manylinux_2_17_aarch64.whl
677470c5aa95272f697d812d83c77f11f6bd9f0ac66f3b6a99668668a46f055a  grpcio-1.80.1-cp314-cp314-manylinux2014_x86_64.manylinux_2_17_x86_64.whl
e2afbae9b8e1825e3529f88d514754e094278bb95eadc0e199751cdd9a2e82a2  protobuf-6.33.6-cp39-abi3-manylinux2014_aarch64.whl
e9db7e292e0ab79dd108d7f1a94fe31601ce1ee3f7b79e0692043423020b0593  protobuf-6.33.6-cp39-abi3-manylinux2014_x86_64.whl
f0fa19c6845758ab08074a0cfa8b7aecb71c999ca73d62883bc25cc018c4e548  typing_extensions-4.15.0-py3-none-any.whl
'
BUILD=.build   # downloaded wheels and packed bundles stay here for the next run

fail() { echo "build_zipapp.sh: $*" >&2; exit 1; }

# The wheels for one processor, and with a second argument for one Python (cp311) alone.
wheels() { grep -E "(cp39-abi3|-${2:-cp[0-9]+}-).*_$1\.|-any\." <<<"$WHEELS" || true; }

# Get one wheel, unless it is there already; either way its hash must be the pinned one.
download() {
  local sha=$1 file=$2 name version tag abi platform
  IFS=- read -r name version tag abi platform <<<"${file%.whl}"
  if [ ! -e "$BUILD/$file" ]; then
    python3 -m pip --version >/dev/null 2>&1 || fail 'python3 has no pip (Debian: apt-get install python3-pip)'
    local targets=(--implementation cp --python-version "${tag#cp}" --abi "$abi" --platform "${platform%%.*}")
    [ "$platform" != any ] || targets=()
    python3 -m pip download -q --disable-pip-version-check --retries 1 --no-deps --only-binary :all: "${targets[@]}" \
      --require-hashes -r /dev/stdin -d "$BUILD" <<<"$name==$version --hash=sha256:$sha" >"$BUILD/pip.log" 2>&1 ||
      fail "cannot download $file: $(grep -m1 ERROR "$BUILD/pip.log" || tail -n1 "$BUILD/pip.log")"
  fi
  sha256sum --status -c <<<"$sha  $BUILD/$file" || fail "$BUILD/$file has another hash than the pinned one: remove it"
}

# Pack the wheels given as lines of `hash  file` into $BUILD/bundle-KEY.tar.xz. The modules for the six Pythons differ
# little: side by side in one 64 MiB window they take little more room than one. What all share comes first.
pack() {
  local key=$1 tree=$BUILD/tree-$1 sha file
  rm -rf "$tree" && mkdir "$tree"
  while read -r sha file; do python3 -m zipfile -e "$BUILD/$file" "$tree"; done
  # A regular package: without this, another `google` further down sys.path would win over this one.
  : >"$tree/google/__init__.py"
  (cd "$tree" && find . -type f -name '*.cpython-*.so' -printf '2 %P\n' -o -type f -printf '1 %P\n') |
    LC_ALL=C sort -V | cut -d' ' -f2- |
    tar -C "$tree" -c -T - --format=ustar --owner=0 --group=0 --numeric-owner --mode=0644 --mtime=@0 |
    xz -T1 --lzma2=preset=1,dict=64MiB,mode=normal,mf=hc4,nice=64 >"$BUILD/partial-$key"
  (cd "$tree" && find . -name 'cygrpc.*.so' -printf '%f\n' | sed 's/^cygrpc//' | LC_ALL=C sort -V) >"$BUILD/targets-$key"
  rm -rf "$tree"
  mv "$BUILD/partial-$key" "$BUILD/bundle-$key.tar.xz"
}

# Stage the bundle of one processor under the name of its content.
stage() {
  local arch=$1 selected key name target
  selected=$(wheels "$arch" "${2:-}")
  key=$(echo "$selected" | cat - build_zipapp.sh | sha256sum | cut -c1-16)
  [ -e "$BUILD/bundle-$key.tar.xz" ] || pack "$key" <<<"$selected"
  name=$arch-$(sha256sum <"$BUILD/bundle-$key.tar.xz" | cut -c1-16).tar.xz
  cp "$BUILD/bundle-$key.tar.xz" "$BUILD/stage/$name"
  while read -r target; do echo "$target $name"; done <"$BUILD/targets-$key" >"$BUILD/bundle-$arch.txt"
}

command -v python3 >/dev/null || fail 'python3 is missing'
command -v xz >/dev/null || fail 'xz is missing (Debian: apt-get install xz-utils)'
python=
case ${1:-} in
  '') arches='x86_64 aarch64' ;;
  --native)
    arches=$(uname -m)
    python=$(python3 -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    [[ $(wheels "$arches" "$python") == *grpcio* ]] || fail "there is no grpcio wheel for $python on $arches among the pinned ones" ;;
  *) fail "unknown argument $1; --native is the only one" ;;
esac

umask 022
mkdir -p "$BUILD"
rm -rf "$BUILD/stage" && mkdir "$BUILD/stage"
for arch in $arches; do
  while read -r sha file; do download "$sha" "$file"; done < <(wheels "$arch" "$python")
done
pids=()
for arch in $arches; do stage "$arch" "$python" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || fail 'packing failed'; done
for arch in $arches; do cat "$BUILD/bundle-$arch.txt"; done >"$BUILD/stage/bundle.txt"
cp agent.py cri_pb2.py kubensage_pb2.py "$BUILD/stage/"
chmod 644 "$BUILD"/stage/*
# As zipapp -m writes it, which would give it the time of day; and zipapp takes the files in the order of the directory.
printf 'import sys\n\nimport agent\nsys.exit(agent.main())\n' >"$BUILD/stage/__main__.py"
chmod 644 "$BUILD"/stage/*
TZ=UTC touch -d 1980-01-01T00:00:00 "$BUILD"/stage/*
rm -f "$BUILD/kubensage-agent.zip"
(cd "$BUILD/stage" && LC_ALL=C && TZ=UTC python3 -m zipfile -c ../kubensage-agent.zip *)
{ echo '#!/usr/bin/env python3'; cat "$BUILD/kubensage-agent.zip"; } >"$BUILD/kubensage-agent.pyz"
chmod 755 "$BUILD/kubensage-agent.pyz"
mv "$BUILD/kubensage-agent.pyz" .
echo "kubensage-agent.pyz: $(wc -c <kubensage-agent.pyz) bytes, $(wc -l <"$BUILD/stage/bundle.txt") targets"
