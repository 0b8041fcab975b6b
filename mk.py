import numpy as np, json, os, zipfile, struct, io, safetensors.numpy as st
B='/tmp/breaker/'
a=dict(np.load(B+'cls.npz'))
# f64 overflow
b=dict(a); b['head/bias']=np.full(10,1e300); np.savez(B+'f64.npz',**b)
b=dict(a); b['head/bias']=np.full(10,np.nan,np.float32); np.savez(B+'nan.npz',**b)
# huge channels claim
def raw(shape,descr='<f4'):
    f=io.BytesIO(); np.lib.format.write_array_header_1_0(f,{'descr':descr,'fortran_order':False,'shape':shape}); return f.getvalue()
with zipfile.ZipFile(B+'chan.npz','w') as z: z.writestr('embedding/kernel.npy',raw((2,2,2**40,0)))
with zipfile.ZipFile(B+'chan2.npz','w') as z: z.writestr('embedding/kernel.npy',raw((2,2,3*10**8,0)))
with zipfile.ZipFile(B+'zero.npz','w') as z: z.writestr('embedding/kernel.npy',raw((0,0,0,0)))
# bool shape
